"""The store's own copy of its database: whole, checked, never in the way, and never replaced by something worse."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from adapters.store import AdapterStore, schema
from adapters.store import backup as backup_module
from tests.unit.adapters.store_support import publish


@pytest.fixture
def store(data_dir: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(data_dir)
    yield store
    store.close()


def names(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [name for (name,) in connection.execute("SELECT name FROM adapters ORDER BY name")]


def test_it_is_written_at_a_clean_end_and_at_every_start(store: AdapterStore, data_dir: Path) -> None:
    backup = data_dir / "store.sqlite3.backup"
    publish(store, "sql")
    assert names(backup) == []
    store.close()
    assert names(backup) == ["sql"]
    assert backup.stat().st_mode & 0o777 == 0o600
    backup.unlink()
    AdapterStore(data_dir).close()
    assert names(backup) == ["sql"]
    assert sorted(path.name for path in data_dir.iterdir() if path.name.startswith("store")) == [
        "store.sqlite3",
        "store.sqlite3.backup",
    ]


def test_it_is_written_after_so_many_changes_of_any_kind(
    store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_module, "CHANGES_BETWEEN", 3)
    backup = data_dir / "store.sqlite3.backup"
    first = publish(store, "sql", b"1").digest
    publish(store, "sql", b"2")
    assert names(backup) == []
    store.rollback("", "sql", first)
    assert names(backup) == ["sql"]
    store.activate("", "sql", "switch")
    store.deactivate("", "sql")
    store.delete("", "sql")
    assert names(backup) == []
    assert list((data_dir / "tmp").iterdir()) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_what_goes_wrong_stops_nothing_and_leaves_the_one_before(
    store: AdapterStore,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
) -> None:
    publish(store, "sql")
    store._backup.write()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        publish(store, "style")
        patch.setattr(os, function, full)
        store._backup.write()
    assert "store.sqlite3.backup could not be written" in caplog.text
    assert names(data_dir / "store.sqlite3.backup") == ["sql"]
    assert list((data_dir / "tmp").iterdir()) == []


def test_a_damaged_database_does_not_replace_it(store: AdapterStore, data_dir: Path) -> None:
    for n in range(20):
        publish(store, f"sql-{n}", info={"text": "x" * 4000})
    store.close()
    path = data_dir / "store.sqlite3"
    image = bytearray(path.read_bytes())
    image[4096 * 2 : 4096 * 4] = os.urandom(4096 * 2)
    path.write_bytes(image)
    store._backup.write()
    assert len(names(data_dir / "store.sqlite3.backup")) == 20


def test_a_copy_from_before_an_upgrade_is_kept(
    store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, "sql")
    store.close()
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, ("ALTER TABLE adapters ADD COLUMN note TEXT",)))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    for _ in range(2):
        AdapterStore(data_dir).close()
    before = data_dir / f"store.sqlite3.schema-{schema.VERSION - 1}"
    assert names(before) == ["sql"]
    with closing(sqlite3.connect(before)) as old:
        assert old.execute("PRAGMA user_version").fetchone() == (schema.VERSION - 1,)
