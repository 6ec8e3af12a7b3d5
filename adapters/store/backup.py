"""A second copy of the database beside it: names are nowhere else, and `repair` restores it when the first is damaged.

It is written whole, checked, and only then put in the place of the one before, at every start, at a clean end, and
after every `CHANGES_BETWEEN` changes. It may lack the latest names, never hold half of one.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

from adapters.errors import StoreCorrupt
from adapters.store.files import fsync_directory, fsync_file

logger = logging.getLogger(__name__)

CHANGES_BETWEEN = 100


class Backup:
    """`store.sqlite3.backup`, and one `store.sqlite3.schema-N` from before each upgrade of the schema.

    It reads the database by a connection of its own, and so holds nobody up. Any thread may call it. What goes wrong
    is logged: the change that brought it about stands.
    """

    def __init__(self, database: Path, tmp: Path) -> None:
        self._database = database
        self._tmp = tmp
        self._path = backup_of(database)
        self._changes = 0
        self._lock = threading.Lock()

    def note_change(self) -> None:
        """Counts a change, and writes the backup when enough have come together."""
        with self._lock:
            self._changes += 1
            due = self._changes % CHANGES_BETWEEN == 0
        if due:
            self.write()

    def write(self) -> None:
        self._write(self._path)

    def write_if_changed(self) -> None:
        """At a clean end: not again what was written at the start."""
        if self._changes % CHANGES_BETWEEN:
            self.write()

    def keep_before_upgrade(self, version: int) -> None:
        """A copy that no later one replaces: an older release may be wanted back."""
        self._write(self._database.with_name(f"{self._database.name}.schema-{version}"))

    def _write(self, target: Path) -> None:
        try:
            copy_database(self._database, target, self._tmp)
        except (OSError, sqlite3.Error, StoreCorrupt) as error:
            logger.warning("%s could not be written: %s", target, error)


def backup_of(database: Path) -> Path:
    return database.with_name(database.name + ".backup")


def copy_database(source: Path, target: Path, tmp: Path) -> None:
    """Puts a copy of a database, as one file, in the place of `target`; it appears whole or not at all.

    Raises StoreCorrupt if the copy is damaged, OSError, sqlite3.Error.
    """
    copy = tmp / f"database-{secrets.token_hex(8)}"
    try:
        os.close(os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with closing(read_only(source)) as reader, closing(sqlite3.connect(copy, isolation_level=None)) as writer:
            reader.backup(writer)
            writer.execute("PRAGMA journal_mode = DELETE")
            (verdict,) = writer.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise StoreCorrupt(f"the copy of {source} is damaged: {verdict}")
        fsync_file(copy)
        os.replace(copy, target)
    finally:
        copy.unlink(missing_ok=True)
    fsync_directory(target.parent)


def read_only(database: Path) -> sqlite3.Connection:
    """A connection that cannot change the database. Raises sqlite3.Error if there is none."""
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
