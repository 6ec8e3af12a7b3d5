"""The adapter store and its disk: order of writes, full disks, damage, newer releases, debris, second owners."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import adapters
from adapters.errors import StorageFull, StoreCorrupt, StoreError, UnsupportedCheckpoint
from adapters.store import AdapterStore, schema
from adapters.store.reserve import Reserve
from tests.unit.adapters.store_support import SHARED, assert_consistent, blobs, publish


class Connection:
    """A connection that fails to commit with one of SQLite's codes, as long as `while_there` exists."""

    def __init__(self, real: sqlite3.Connection, code: int, while_there: Path = Path("/")) -> None:
        self._real = real
        self._code = code
        self._while_there = while_there

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if sql == "COMMIT" and self._while_there.exists():
            error = sqlite3.OperationalError("the disk gave in")
            error.sqlite_errorcode = self._code
            raise error
        return self._real.execute(sql, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_files_reach_the_disk_before_the_row(
    store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        events.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        events.append(("rename", os.stat(source).st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    store._database.connection.set_trace_callback(lambda sql: events.append(("commit", 0)) if sql == "COMMIT" else None)
    blob = store.path(publish(store, "sql", b"1").digest)
    files = [("fsync", path.stat().st_ino) for path in sorted(blob.iterdir())]
    inode = blob.stat().st_ino
    assert events == [
        *files,
        ("fsync", inode),
        ("rename", inode),
        ("fsync", blob.parent.stat().st_ino),
        ("commit", 0),
    ]


class TestFullDisk:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    @pytest.mark.parametrize(
        ("function", "call"), [("fsync", 0), ("fsync", 1), ("fsync", 2), ("fsync", 3), ("rename", 0), ("mkdir", 0)]
    )
    def test_file_system(
        self,
        store: AdapterStore,
        data_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
        function: str,
        call: int,
        number: int,
    ) -> None:
        before = publish(store, "sql", b"1")
        real, calls = getattr(os, function), iter(range(100))

        def full(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(StorageFull, match="make room"):
                publish(store, "sql", b"2")
        assert store.get(SHARED, "sql") == before
        assert_consistent(store, data_dir)
        assert publish(store, "sql", b"2").versions[1:] == before.versions

    def test_database(self, store: AdapterStore, data_dir: Path) -> None:
        before = publish(store, "sql", b"1")
        connection = store._database.connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageFull):
            publish(store, "sql", b"2", info={"text": "x" * 100_000})
        assert store.get(SHARED, "sql") == before
        assert_consistent(store, data_dir)
        connection.execute("PRAGMA max_page_count = 1000000")
        assert publish(store, "sql", b"2", info={"text": "x" * 100_000}).digest != before.digest

    def test_commit(self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = publish(store, "sql", b"1")
        store.activate(SHARED, "sql", "switch")
        failing = Connection(store._database.connection, sqlite3.SQLITE_FULL)
        with monkeypatch.context() as patch:
            patch.setattr(store._database, "connection", failing)
            with pytest.raises(StorageFull):
                publish(store, "sql", b"2")
            with pytest.raises(StorageFull):
                store.delete(SHARED, "sql")
            with pytest.raises(StorageFull):
                store.deactivate(SHARED, "sql")
        assert store.get(SHARED, "sql") == before
        assert store.active(SHARED) is not None
        assert_consistent(store, data_dir)

    def test_an_adapter_can_still_be_deleted(
        self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(store, "sql", b"1")
        reserve = data_dir / "reserve"
        assert reserve.stat().st_size == 1 << 20
        failing = Connection(store._database.connection, sqlite3.SQLITE_FULL, while_there=reserve)
        with monkeypatch.context() as patch:
            patch.setattr(store._database, "connection", failing)
            store.delete(SHARED, "sql")
        assert store.count(SHARED) == 0
        assert reserve.exists()
        assert_consistent(store, data_dir)

    def test_no_room_for_a_reserve(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(size: int) -> bytes:
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(os, "urandom", full)
        Reserve(tmp_path / "reserve").fill()
        assert list(tmp_path.iterdir()) == []

    def test_while_staging(self, store: AdapterStore) -> None:
        with pytest.raises(StorageFull), store.staging():
            raise OSError(errno.ENOSPC, "no space")
        with pytest.raises(IsADirectoryError), store.staging():
            raise IsADirectoryError


class TestFailingDisk:
    def test_commit_that_may_have_happened_keeps_the_files(
        self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = publish(store, "sql", b"1")
        failing = Connection(store._database.connection, sqlite3.SQLITE_IOERR_FSYNC)
        with monkeypatch.context() as patch:
            patch.setattr(store._database, "connection", failing)
            with pytest.raises(StoreError, match="commit"):
                publish(store, "sql", b"2")
        assert store.get(SHARED, "sql") == before
        assert len(blobs(data_dir)) == 2
        store.close()
        with closing(AdapterStore(data_dir)) as reopened:
            assert reopened.get(SHARED, "sql") == before
            assert_consistent(reopened, data_dir)

    def test_files_that_cannot_be_removed_wait_for_the_next_start(
        self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(store, "sql", b"1")

        def refuse(*args: object) -> None:
            raise PermissionError(errno.EACCES, "denied")

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", refuse)
            store.delete(SHARED, "sql")
        assert (store.count(SHARED), len(blobs(data_dir))) == (0, 1)
        store.close()
        with closing(AdapterStore(data_dir)) as reopened:
            assert_consistent(reopened, data_dir)

    def test_other_failures_are_store_errors(self, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("a file")
        with pytest.raises(StoreError, match="cannot use its files"):
            AdapterStore(tmp_path / "data")


class TestStagedFiles:
    """Nothing but plain files of our own ever becomes a blob."""

    @pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "directory", "socket", "empty"])
    def test_anything_else_is_refused(self, store: AdapterStore, data_dir: Path, tmp_path: Path, kind: str) -> None:
        secret = tmp_path / "secret"
        secret.write_text("secret")
        secret.chmod(0o644)
        with store.staging() as staged:
            odd = staged / "adapter_model.safetensors"
            match kind:
                case "link":
                    odd.symlink_to(secret)
                case "dangling link":
                    odd.symlink_to(tmp_path / "none")
                case "hard link":
                    os.link(secret, odd)
                case "pipe":
                    os.mkfifo(odd)
                case "directory":
                    odd.mkdir()
                case "socket":
                    os.mknod(odd, stat.S_IFSOCK)
            with pytest.raises(UnsupportedCheckpoint):
                store.publish(SHARED, "sql", staged, {})
        assert store.count(SHARED) == 0
        assert_consistent(store, data_dir)
        assert stat.S_IMODE(secret.stat().st_mode) == 0o644


class TestOpening:
    def test_debris_is_swept_up(self, store: AdapterStore, data_dir: Path) -> None:
        record = publish(store, "sql", b"1")
        store.close()
        root = data_dir / "blobs" / "sha256"
        shutil.copytree(store.path(record.digest), root / ("0" * 64))
        (root / ("1" * 64)).mkdir()
        (root / "lost+found").mkdir()
        shutil.copytree(store.path(record.digest), data_dir / "tmp" / "staging-1")
        (data_dir / "tmp" / "upload").write_bytes(b"half")
        (data_dir / "tmp" / "link").symlink_to(root)
        with closing(AdapterStore(data_dir)) as reopened:
            assert reopened.get(SHARED, "sql") == record
            assert {path.name for path in root.iterdir()} == {"lost+found", record.digest[7:]}
            assert list((data_dir / "tmp").iterdir()) == []

    def test_a_version_without_its_files_is_still_listed(self, store: AdapterStore, data_dir: Path) -> None:
        record = publish(store, "sql", b"1")
        store.close()
        shutil.rmtree(store.path(record.digest))
        with closing(AdapterStore(data_dir)) as reopened:
            assert [version for _, _, version in reopened.all_versions()] == list(record.versions)
            assert publish(reopened, "sql", b"1") == record
            assert_consistent(reopened, data_dir)

    def test_a_second_process_is_refused(self, store: AdapterStore, data_dir: Path) -> None:
        script = """if True:
            import pathlib, sys
            from adapters.errors import StoreError
            from adapters.store import AdapterStore
            try:
                AdapterStore(pathlib.Path(sys.argv[1]))
            except StoreError as error:
                print(error)
        """
        command = [sys.executable, "-c", script, str(data_dir)]
        root = Path(adapters.__file__).parents[1]

        def second() -> str:
            return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout

        refusal = second()
        assert str(data_dir) in refusal
        assert f"(id {os.getpid()})" in refusal
        publish(store, "sql", b"1")
        store.close()
        store.close()
        assert second() == ""

    def test_a_newer_schema_is_left_alone(self, store: AdapterStore, data_dir: Path) -> None:
        store.close()
        with closing(sqlite3.connect(data_dir / "store.sqlite3")) as database:
            database.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
        before = (data_dir / "store.sqlite3").read_bytes()
        with pytest.raises(StoreCorrupt, match=f"schema {schema.VERSION + 1}.* newer release"):
            AdapterStore(data_dir)
        assert (data_dir / "store.sqlite3").read_bytes() == before

    def test_not_a_database(self, store: AdapterStore, data_dir: Path) -> None:
        publish(store, "sql", b"1")
        store.close()
        (data_dir / "store.sqlite3").write_bytes(b"definitely not SQLite" * 400)
        with pytest.raises(StoreCorrupt, match="restore it from a backup"):
            AdapterStore(data_dir)
        assert len(blobs(data_dir)) == 1

    def test_a_damaged_page(self, store: AdapterStore, data_dir: Path) -> None:
        for n in range(20):
            publish(store, f"sql-{n}", b"1", info={"text": "x" * 4000})
        store.close()
        path = data_dir / "store.sqlite3"
        image = bytearray(path.read_bytes())
        image[4096 * 2 : 4096 * 4] = os.urandom(4096 * 2)
        path.write_bytes(image)
        with pytest.raises(StoreCorrupt, match="restore it from a backup"):
            AdapterStore(data_dir)
        assert len(blobs(data_dir)) == 1

    @pytest.mark.parametrize("size", [1, 99, 100, 512, 4095, 4096, 4097, 8192, 12288, -4096])
    def test_a_truncated_database(self, store: AdapterStore, data_dir: Path, size: int) -> None:
        for n in range(5):
            publish(store, f"sql-{n}", b"1", info={"text": "x" * 4000})
        store.close()
        path = data_dir / "store.sqlite3"
        os.truncate(path, size if size > 0 else path.stat().st_size + size)
        with pytest.raises(StoreCorrupt, match="restore it from a backup") as refusal:
            AdapterStore(data_dir)
        assert str(path) in str(refusal.value)
        assert f"`vblora-serve doctor --data-dir {data_dir} --repair`" in str(refusal.value)
        assert len(blobs(data_dir)) == 1

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE versions SET info = '{'",
            "UPDATE versions SET info = CAST(x'7bff7d' AS TEXT)",
            "UPDATE versions SET info = x'ff'",
        ],
    )
    def test_a_row_that_cannot_be_right(self, store: AdapterStore, data_dir: Path, statement: str) -> None:
        """SQLite keeps no checksums: a flipped bit in a row passes its checks."""
        publish(store, "sql", b"1")
        store.close()
        with closing(sqlite3.connect(data_dir / "store.sqlite3", isolation_level=None)) as database:
            database.execute(statement)
        with closing(AdapterStore(data_dir)) as reopened:
            with pytest.raises(StoreCorrupt, match="vblora-serve doctor"):
                reopened.get(SHARED, "sql")
            with pytest.raises(StoreCorrupt, match="vblora-serve doctor"):
                reopened.list(SHARED)

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE adapters SET digest = 'sha256:00'",
            "DELETE FROM versions",
            "DELETE FROM adapters",
            "INSERT INTO activations VALUES ('', '', 'ghost', 'switch')",
        ],
    )
    def test_rows_that_name_others_that_are_lost(self, store: AdapterStore, data_dir: Path, statement: str) -> None:
        """What they named must not be taken for debris."""
        publish(store, "sql", b"1")
        store.close()
        with closing(sqlite3.connect(data_dir / "store.sqlite3", isolation_level=None)) as database:
            database.execute(statement)
        with pytest.raises(StoreCorrupt, match=r"is not there.*vblora-serve doctor"):
            AdapterStore(data_dir)
        assert len(blobs(data_dir)) == 1

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
    def test_a_directory_that_cannot_be_written(
        self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        publish(store, "sql", b"1")
        store.close()
        real = os.open

        def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, flags, *args, **options)

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(StoreError, match="cannot use its files") as refusal:
            AdapterStore(data_dir)
        assert str(data_dir) in str(refusal.value)
        assert len(blobs(data_dir)) == 1

    def test_a_database_that_cannot_be_written(self, store: AdapterStore, data_dir: Path) -> None:
        publish(store, "sql", b"1")
        store._database.connection.execute("PRAGMA query_only = ON")
        with pytest.raises(StoreError, match="cannot use"):
            publish(store, "sql", b"2")
        assert len(blobs(data_dir)) == 1

    def test_damage_found_later(self, store: AdapterStore) -> None:
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        with pytest.raises(StoreCorrupt, match="malformed"), store._reading():
            raise error

    def test_somebody_elses_database(self, data_dir: Path) -> None:
        data_dir.mkdir()
        with closing(sqlite3.connect(data_dir / "store.sqlite3")) as database:
            database.execute("CREATE TABLE photos (id INTEGER)")
        with pytest.raises(StoreCorrupt, match="not an adapter store's"):
            AdapterStore(data_dir)

    @pytest.mark.parametrize("emptied", [True, False])
    def test_a_lost_database_does_not_make_every_adapter_an_orphan(
        self, store: AdapterStore, data_dir: Path, emptied: bool
    ) -> None:
        publish(store, "sql", b"1")
        store.close()
        (data_dir / "store.sqlite3").unlink()
        if emptied:
            (data_dir / "store.sqlite3").touch()
        with pytest.raises(StoreCorrupt, match="missing or empty"):
            AdapterStore(data_dir)
        assert len(blobs(data_dir)) == 1

    def test_a_failed_migration_changes_nothing(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(schema, "MIGRATIONS", ((*schema.MIGRATIONS[0], "CREATE TABLE adapters (id)"),))
            with pytest.raises(sqlite3.OperationalError):
                AdapterStore(data_dir)
        with closing(AdapterStore(data_dir)) as store:
            publish(store, "sql", b"1")

    def test_an_older_schema_is_upgraded(
        self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = publish(store, "sql", b"1")
        store.close()
        added = ("ALTER TABLE adapters ADD COLUMN note TEXT",)
        monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, added))
        monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
        for _ in range(2):
            with closing(AdapterStore(data_dir)) as upgraded:
                assert upgraded.get(SHARED, "sql") == record

    def test_durability_settings(self, store: AdapterStore) -> None:
        def pragma(name: str) -> object:
            return store._database.connection.execute(f"PRAGMA {name}").fetchone()[0]

        assert pragma("journal_mode") == "wal"
        assert (pragma("synchronous"), pragma("foreign_keys"), pragma("busy_timeout")) == (2, 1, 5000)
