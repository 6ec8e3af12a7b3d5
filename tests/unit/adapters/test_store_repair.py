"""A data directory checked and mended: everything that is wrong is found, and nothing that is intact is lost."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from adapters.errors import StoreError
from adapters.store import Activation, AdapterStore, schema
from adapters.store.backup import copy_database
from adapters.store.inventory import Problem
from adapters.store.repair import Report, examine, repair
from tests.unit.adapters.store_support import SHARED, assert_consistent, blobs, flip_a_bit, publish

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def digests(data_dir: Path) -> dict[str, str]:
    """A store with `sql` of two versions, the newer one current and active; `style`; and `mine`, a tenant's own."""
    with closing(AdapterStore(data_dir)) as store:
        found = {"sql-1": publish(store, "sql", b"1").digest, "sql-2": publish(store, "sql", b"2").digest}
        found["style"] = publish(store, "style", b"3").digest
        found["mine"] = publish(store, "mine", b"4", tenant="acme").digest
        store.activate(SHARED, "sql", "merge")
    return found


@pytest.fixture
def contents(data_dir: Path, digests: dict[str, str]) -> Callable[[], object]:
    """What the store answers, once it is opened."""

    def read() -> object:
        with closing(AdapterStore(data_dir)) as store:
            assert_consistent(store, data_dir)
            return [store.list(SHARED), store.list("acme"), store.active(SHARED)]

    return read


def blob(data_dir: Path, digest: str) -> Path:
    return data_dir / "blobs" / "sha256" / digest[7:]


def problems(report: Report) -> list[tuple[Problem, str]]:
    return [(finding.problem, finding.subject) for finding in report.findings]


def sql(data_dir: Path, *statements: str) -> None:
    with closing(sqlite3.connect(data_dir / "store.sqlite3", isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def files(data_dir: Path) -> dict[str, bytes]:
    """Every file's content but the lock's, which says who looked last."""
    found = [path for path in data_dir.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(data_dir)): path.read_bytes() for path in found}


def quarantined(data_dir: Path) -> set[str]:
    folder = data_dir / "quarantine"
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_a_sound_store_is_healthy_and_is_left_alone(
    data_dir: Path, digests: dict[str, str], contents: Callable[[], object]
) -> None:
    before = contents()
    image = files(data_dir)
    report = examine(data_dir)
    assert (report.findings, report.adapters, report.versions, report.files) == ((), 3, 4, 4)
    assert files(data_dir) == image
    assert repair(data_dir) == report
    assert contents() == before
    assert quarantined(data_dir) == set()


def test_a_store_that_was_never_used(data_dir: Path) -> None:
    AdapterStore(data_dir).close()
    assert examine(data_dir) == repair(data_dir) == Report((), ())
    (data_dir / "store.sqlite3").unlink()
    assert examine(data_dir) == repair(data_dir) == Report((), ())
    assert not (data_dir / "store.sqlite3").exists()


def test_checking_changes_nothing(data_dir: Path, digests: dict[str, str]) -> None:
    flip_a_bit(blob(data_dir, digests["sql-2"]) / WEIGHTS)
    shutil.rmtree(blob(data_dir, digests["style"]))
    (data_dir / "tmp" / "staging-1").mkdir()
    image = files(data_dir)
    report = examine(data_dir)
    assert len(report.remaining) == 3
    assert report.findings == report.remaining
    assert files(data_dir) == image


def test_debris_is_removed_and_unreferenced_files_are_kept_aside(
    data_dir: Path, digests: dict[str, str], contents: Callable[[], object]
) -> None:
    before = contents()
    orphan = "e" * 64
    shutil.copytree(blob(data_dir, digests["style"]), data_dir / "blobs" / "sha256" / orphan)
    (data_dir / "tmp" / "staging-1").mkdir()
    report = repair(data_dir)
    assert problems(report) == [(Problem.UNREFERENCED, f"sha256:{orphan}"), (Problem.LEFTOVER, "tmp/staging-1")]
    assert report.remaining == ()
    assert quarantined(data_dir) == {f"{orphan}.1"}
    assert contents() == before


@pytest.mark.parametrize("damage", ["flipped", "gone", "a file gone", "a file more", "a link"])
def test_an_earlier_version_takes_over_from_one_that_is_lost(
    data_dir: Path, digests: dict[str, str], damage: str
) -> None:
    path = blob(data_dir, digests["sql-2"])
    if damage == "flipped":
        flip_a_bit(path / WEIGHTS)
    elif damage == "gone":
        shutil.rmtree(path)
    elif damage == "a file gone":
        (path / WEIGHTS).unlink()
    elif damage == "a file more":
        (path / "more").write_text("x")
    else:
        shutil.move(path / WEIGHTS, data_dir / "elsewhere")
        (path / WEIGHTS).symlink_to(data_dir / "elsewhere")
    report = repair(data_dir)
    expected = Problem.MISSING if damage == "gone" else Problem.DAMAGED
    assert problems(report) == [(expected, "sql")]
    assert digests["sql-2"] in report.found[0].message
    assert report.remaining == ()
    assert quarantined(data_dir) == (set() if damage == "gone" else {f"{path.name}.1"})
    with closing(AdapterStore(data_dir)) as store:
        record = store.get(SHARED, "sql")
        assert [version.digest for version in record.versions] == [record.digest] == [digests["sql-1"]]
        assert store.active(SHARED) == Activation(SHARED, "sql", "merge", SHARED)
        assert store.get(SHARED, "style").digest == digests["style"]
        assert_consistent(store, data_dir)
        assert publish(store, "sql", b"2").digest == digests["sql-2"]


def test_an_adapter_of_which_nothing_is_left_is_forgotten(data_dir: Path, digests: dict[str, str]) -> None:
    for name in ("sql-1", "sql-2", "mine"):
        shutil.rmtree(blob(data_dir, digests[name]))
    report = repair(data_dir)
    assert {subject for _, subject in problems(report)} == {"sql", "acme/mine"}
    assert report.remaining == ()
    with closing(AdapterStore(data_dir)) as store:
        assert [record.name for record in store.list(SHARED)[0]] == ["style"]
        assert store.count("acme") == 0
        assert store.active(SHARED) is None


def test_files_of_two_names_are_lost_to_both(data_dir: Path, digests: dict[str, str]) -> None:
    with closing(AdapterStore(data_dir)) as store:
        publish(store, "copy", b"3")
    flip_a_bit(blob(data_dir, digests["style"]) / WEIGHTS)
    assert sorted(problems(repair(data_dir))) == [(Problem.DAMAGED, "copy"), (Problem.DAMAGED, "style")]
    assert len(quarantined(data_dir)) == 1
    assert examine(data_dir).findings == ()


@pytest.mark.parametrize(
    ("statement", "problem", "subject"),
    [
        ("DELETE FROM adapters WHERE name = 'sql'", Problem.CURRENT, "sql"),
        ("UPDATE adapters SET digest = 'sha256:00' WHERE name = 'sql'", Problem.CURRENT, "sql"),
        ("INSERT INTO adapters VALUES ('', 'ghost', 'sha256:00', 1.0, 1.0)", Problem.CURRENT, "ghost"),
        ("INSERT INTO activations VALUES ('acme', 'acme', 'ghost', 'merge')", Problem.ACTIVATION, "acme/ghost"),
    ],
)
def test_rows_that_contradict_each_other(
    data_dir: Path,
    digests: dict[str, str],
    contents: Callable[[], object],
    statement: str,
    problem: Problem,
    subject: str,
) -> None:
    sql(data_dir, "PRAGMA foreign_keys = OFF", statement)
    report = repair(data_dir)
    assert (problem, subject) in problems(report)
    assert report.remaining == ()
    with closing(AdapterStore(data_dir)) as store:
        record = store.get(SHARED, "sql")
        assert [version.digest for version in record.versions] == [digests["sql-2"], digests["sql-1"]]
        assert record.digest == digests["sql-2"]
        assert store.count(SHARED) == 2
        assert store._database.connection.execute("PRAGMA foreign_key_check").fetchall() == []


@pytest.mark.parametrize("broken", ["info = '{'", "info = x'ff'", "info = '[]'", "digest = 'sha256:1'"])
def test_a_row_that_cannot_be_read_leaves_its_files_aside(data_dir: Path, digests: dict[str, str], broken: str) -> None:
    sql(data_dir, "PRAGMA foreign_keys = OFF", f"UPDATE versions SET {broken} WHERE digest = '{digests['sql-2']}'")
    report = repair(data_dir)
    assert (Problem.ROW, "sql") in problems(report)
    assert report.remaining == ()
    assert quarantined(data_dir) == {f"{digests['sql-2'][7:]}.1"}
    with closing(AdapterStore(data_dir)) as store:
        assert store.get(SHARED, "sql").digest == digests["sql-1"]


class TestDatabase:
    """Names are in the database alone: it comes back from the copy that the store keeps."""

    @pytest.mark.parametrize("how", ["garbage", "truncated", "a page", "empty", "missing"])
    def test_it_is_restored(
        self, data_dir: Path, digests: dict[str, str], contents: Callable[[], object], how: str
    ) -> None:
        before = contents()
        path = data_dir / "store.sqlite3"
        image = path.read_bytes()
        if how == "missing":
            path.unlink()
        else:
            damaged = {
                "garbage": b"no database" * 1000,
                "truncated": image[: len(image) // 2],
                "a page": image[:4096] + os.urandom(4096) + image[8192:],
                "empty": b"",
            }
            path.write_bytes(damaged[how])
        assert problems(examine(data_dir)) == [(Problem.DATABASE, "store.sqlite3")]
        with pytest.raises(StoreError, match=r"vblora-serve doctor --data-dir \S+ --repair"):
            AdapterStore(data_dir)  # in place of one that is missing, this leaves an empty one
        report = repair(data_dir)
        assert "can be restored" in report.found[0].message
        assert report.remaining == ()
        assert quarantined(data_dir) == {"store.sqlite3.1"}
        assert contents() == before

    def test_what_the_copy_does_not_know_is_kept_aside(
        self, data_dir: Path, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A name that is newer than the copy is lost; its files are not."""
        with closing(AdapterStore(data_dir)) as store:
            newer = publish(store, "newer", b"5").digest
            store.delete("acme", "mine")
            monkeypatch.setattr(store._backup, "write", lambda: None)
        (data_dir / "store.sqlite3").write_bytes(b"no database" * 1000)
        report = repair(data_dir)
        assert {problem for problem, _ in problems(report)} == {Problem.DATABASE, Problem.UNREFERENCED, Problem.MISSING}
        assert (Problem.UNREFERENCED, newer) in problems(report)
        assert (Problem.MISSING, "acme/mine") in problems(report)
        assert report.remaining == ()
        assert (data_dir / "quarantine" / f"{newer[7:]}.1" / WEIGHTS).read_bytes() == b"5"
        with closing(AdapterStore(data_dir)) as store:
            assert [record.name for record in store.list(SHARED)[0]] == ["sql", "style"]
            assert store.count("acme") == 0
            assert_consistent(store, data_dir)

    def test_what_the_copy_does_not_know_is_aside_before_the_copy_is_in_place(
        self, data_dir: Path, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server that starts after a kill in between would sweep it up."""
        with closing(AdapterStore(data_dir)) as store:
            newer = publish(store, "newer", b"5").digest
            monkeypatch.setattr(store._backup, "write", lambda: None)
        (data_dir / "store.sqlite3").write_bytes(b"no database" * 1000)

        def killed_after(*args: Path) -> None:
            copy_database(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr("adapters.store.repair.copy_database", killed_after)
        with pytest.raises(KeyboardInterrupt):
            repair(data_dir)
        AdapterStore(data_dir).close()
        assert (data_dir / "quarantine" / f"{newer[7:]}.1" / WEIGHTS).read_bytes() == b"5"

    def test_killed_in_the_middle_it_is_repaired_again(
        self, data_dir: Path, digests: dict[str, str], contents: Callable[[], object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = contents()
        (data_dir / "store.sqlite3").write_bytes(b"no database" * 1000)

        def killed(*args: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("adapters.store.repair.copy_database", killed)
            with pytest.raises(KeyboardInterrupt):
                repair(data_dir)
        with pytest.raises(StoreError, match="missing or empty"):
            AdapterStore(data_dir)
        assert repair(data_dir).remaining == ()
        assert contents() == before

    @pytest.mark.parametrize("backup", ["missing", "garbage", "damaged", "somebody else's"])
    def test_without_a_sound_copy_nothing_is_touched(
        self, data_dir: Path, digests: dict[str, str], backup: str
    ) -> None:
        path, copy = data_dir / "store.sqlite3", data_dir / "store.sqlite3.backup"
        image = copy.read_bytes()
        copy.unlink()
        if backup == "garbage":
            copy.write_bytes(b"x" * 5000)
        elif backup == "damaged":
            copy.write_bytes(image[:4096] + os.urandom(4096) + image[8192:])
        elif backup == "somebody else's":
            with closing(sqlite3.connect(copy)) as other:
                other.execute("CREATE TABLE photos (id INTEGER)")
        path.write_bytes(b"no database" * 1000)
        before = files(data_dir)
        report = repair(data_dir)
        assert report.remaining == report.found
        assert "restore a backup" in report.remaining[0].message
        assert files(data_dir) == before

    @pytest.mark.parametrize("statement", [f"PRAGMA user_version = {schema.VERSION + 1}", "PRAGMA application_id = 7"])
    def test_one_that_is_not_ours_is_left_alone(self, data_dir: Path, digests: dict[str, str], statement: str) -> None:
        sql(data_dir, statement)
        before = files(data_dir)
        report = repair(data_dir)
        assert problems(report) == [(Problem.DATABASE, "store.sqlite3")]
        assert report.remaining == report.found
        assert files(data_dir) == before
        assert len(blobs(data_dir)) == 4

    def test_an_older_schema_is_the_servers_to_upgrade(
        self, data_dir: Path, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
        report = repair(data_dir)
        assert "start the server, which upgrades it" in report.remaining[0].message

    def test_an_index_is_rebuilt_in_place(
        self, data_dir: Path, digests: dict[str, str], contents: Callable[[], object]
    ) -> None:
        before = contents()
        (data_dir / "store.sqlite3.backup").unlink()
        sql(
            data_dir,
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_schema SET sql = 'CREATE INDEX versions_by_digest ON versions (tenant)'"
            " WHERE name = 'versions_by_digest'",
        )
        assert problems(examine(data_dir)) == [(Problem.DATABASE, "store.sqlite3")]
        assert repair(data_dir).remaining == ()
        assert quarantined(data_dir) == set()
        sql(
            data_dir,
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_schema SET sql = 'CREATE INDEX versions_by_digest ON versions (digest)'"
            " WHERE name = 'versions_by_digest'",
        )
        assert repair(data_dir).remaining == ()
        assert contents() == before


@pytest.fixture
def running(data_dir: Path, digests: dict[str, str]) -> Iterator[AdapterStore]:
    store = AdapterStore(data_dir)
    yield store
    store.close()


@pytest.mark.parametrize("check", [examine, repair])
def test_never_beside_a_server(running: AdapterStore, data_dir: Path, check: Callable[[Path], Report]) -> None:
    before = files(data_dir)
    with pytest.raises(StoreError, match=rf"in use by another process \(id {os.getpid()}\): stop that one"):
        check(data_dir)
    assert files(data_dir) == before


@pytest.mark.parametrize("check", [examine, repair])
def test_what_is_no_store_is_left_alone(tmp_path: Path, check: Callable[[Path], Report]) -> None:
    with pytest.raises(StoreError, match="holds no adapter store"):
        check(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError, match="holds no adapter store"):
        check(tmp_path / "none")


def test_names_in_quarantine_are_never_reused(data_dir: Path, digests: dict[str, str]) -> None:
    for _ in range(2):
        flip_a_bit(blob(data_dir, digests["style"]) / WEIGHTS)
        repair(data_dir)
        with closing(AdapterStore(data_dir)) as store:
            publish(store, "style", b"3")
    assert quarantined(data_dir) == {f"{digests['style'][7:]}.1", f"{digests['style'][7:]}.2"}
