"""The SQLite file: opening and upgrading it, transactions, and SQLite's errors as the store's.

StoreError
├── StorageFull          the disk is full; nothing has changed
├── StoreCorrupt
│   ├── DatabaseDamaged      damaged, or lost while the files that it names are there
│   └── NotOurDatabase       somebody else's, or of another release
└── CommitUncertain      a commit failed half way: only the next start knows whether it happened
"""

from __future__ import annotations

import os
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.errors import StoreCorrupt, StoreError
from adapters.store import schema
from adapters.store.files import storage_full

_BUSY_TIMEOUT_S = 5.0
_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_REFUSED = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    }
)


class CommitUncertain(StoreError):
    pass


class DatabaseDamaged(StoreCorrupt):
    """`reason` completes "the database is …"."""

    def __init__(self, path: Path, reason: str) -> None:
        command = f"vblora-serve doctor --data-dir {shlex.quote(str(path.parent))} --repair"
        super().__init__(
            f"{path} is {reason}; the adapters' files beside it are untouched: restore it from a backup, or run "
            f"`{command}`, which restores the copy that the store itself keeps"
        )
        self.reason = reason


class NotOurDatabase(StoreCorrupt):
    """It may well be sound: nothing here may replace it."""


class Database:
    """One connection. It may be used by any thread, by one at a time: callers hold their own lock.

    Raises StoreCorrupt for a file that is damaged, foreign or of a newer schema, StoreError when it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self.connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            with self.reading():
                self._refuse_foreign()
                self.connection.execute("PRAGMA journal_mode = WAL")
                self.connection.execute("PRAGMA synchronous = FULL")
                self.connection.execute("PRAGMA foreign_keys = ON")
                self._refuse_damaged()
        except BaseException:
            self.connection.close()
            raise

    @property
    def is_new(self) -> bool:
        """Whether no schema has been written yet."""
        return self.schema_version == 0

    @property
    def schema_version(self) -> int:
        return self._pragma("user_version")

    def migrate(self) -> None:
        """Bring the schema up to date, each step in a transaction of its own."""
        for version in range(self.schema_version, schema.VERSION):
            with self.writing() as sql:
                for statement in schema.MIGRATIONS[version]:
                    sql.execute(statement)
                sql.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
                sql.execute(f"PRAGMA user_version = {version + 1}")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Inside, SQLite's errors are the store's."""
        try:
            yield self.connection
        except sqlite3.Error as error:
            translated = self._translated(error)
            if translated is None:
                raise  # a bug of ours: let it be seen
            raise translated from error

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: on the disk when the block ends, undone when the block raises."""
        with self.reading():
            self.connection.execute("BEGIN IMMEDIATE")
        try:
            with self.reading():
                yield self.connection
        except BaseException:
            self._roll_back()
            raise
        self._commit()

    def close(self) -> None:
        self.connection.close()

    def _commit(self) -> None:
        try:
            self.connection.execute("COMMIT")
        except sqlite3.IntegrityError:
            self._roll_back()
            raise
        except sqlite3.Error as error:
            self._roll_back()
            if _primary_code(error) == sqlite3.SQLITE_FULL:  # the commit mark, written last, found no room
                raise storage_full() from error
            raise CommitUncertain(
                f"the adapter store could not commit to {self.path}: {error}; "
                "check the disk, and restart to see whether the change was kept"
            ) from error

    def _roll_back(self) -> None:
        if self.connection.in_transaction:
            with suppress(sqlite3.Error):  # the error that brought us here says more
                self.connection.execute("ROLLBACK")

    def _refuse_foreign(self) -> None:
        is_empty = self._pragma("schema_version") == 0
        if not is_empty and self._pragma("application_id") != schema.APPLICATION_ID:
            raise NotOurDatabase(
                f"{self.path} is a SQLite database, but not an adapter store's: choose another data directory"
            )
        version = self.schema_version
        if version > schema.VERSION:
            raise NotOurDatabase(
                f"{self.path} has schema {version}, and this release knows schemas up to {schema.VERSION}: "
                "start the newer release that wrote it, or restore a backup from before the upgrade"
            )

    def check_integrity(self) -> None:
        """Reads all of the file, indexes included. Raises DatabaseDamaged."""
        with self.reading() as connection:
            (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise DatabaseDamaged(self.path, f"damaged ({verdict})")

    def _refuse_damaged(self) -> None:
        (verdict,) = self.connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise DatabaseDamaged(self.path, f"damaged ({verdict})")

    def _pragma(self, name: str) -> int:
        (value,) = self.connection.execute(f"PRAGMA {name}").fetchone()
        return int(value)

    def _translated(self, error: sqlite3.Error) -> StoreError | None:
        code = _primary_code(error)
        if code == sqlite3.SQLITE_FULL:
            return storage_full()
        if code in _CORRUPT:
            return DatabaseDamaged(self.path, f"damaged ({error})")
        if code in _REFUSED:
            return StoreError(f"the adapter store cannot use {self.path}: {error}")
        return None


def _primary_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for errors of the Python module itself, which have none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
