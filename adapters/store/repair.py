"""A data directory checked as a whole and, if asked, mended. No server may run on it meanwhile.

Nothing that is intact is removed or forgotten. What is taken out of service goes to `quarantine/`: files that are not
what their digest says, files that no adapter has, a database that is damaged. Rows are dropped only where their files
are lost; the name's newest version that is left becomes current, if there is one.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import StoreError
from adapters.store import schema
from adapters.store.backup import backup_of, copy_database, read_only
from adapters.store.blobs import BlobDirectory
from adapters.store.database import Database, DatabaseDamaged, NotOurDatabase
from adapters.store.files import fsync_directory, make_directory, storage_errors
from adapters.store.inventory import Finding, Inventory, Problem, findings_of, take_inventory
from adapters.store.lock import DirectoryLock

DATABASE = "store.sqlite3"
_DATABASE_FILES = ("", "-wal", "-shm")


@dataclass(frozen=True, slots=True)
class Report:
    """What was wrong, and of that what still is. The counts are of what is there now."""

    found: tuple[Finding, ...]
    remaining: tuple[Finding, ...]
    adapters: int = 0
    versions: int = 0
    files: int = 0

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found, and what only the repair has brought to light."""
        return (*self.found, *(finding for finding in self.remaining if finding not in self.found))


def examine(data_dir: Path) -> Report:
    """Checks a data directory. Raises StoreError if it is none, if another process owns it, or if the disk fails."""
    with _owned(data_dir) as store:
        found, inventory = store.look()
        return _report(found, found, inventory)


def repair(data_dir: Path) -> Report:
    """Checks a data directory and mends what can be mended. Raises StoreError as `examine` does."""
    with _owned(data_dir) as store:
        found, inventory = store.look()
        if inventory is None:
            found += store.mend_database()
            more, inventory = store.look()
            found += tuple(finding for finding in more if finding not in found)
        if inventory is not None:
            store.mend(inventory)
        remaining, inventory = store.look()
        return _report(found, remaining, inventory)


@contextmanager
def _owned(data_dir: Path) -> Iterator[_Store]:
    data_dir = data_dir.absolute()
    if not any((data_dir / name).exists() for name in (DATABASE, f"{DATABASE}.backup", "blobs")):
        raise StoreError(f"{data_dir} holds no adapter store: give the --data-dir of a server")
    with storage_errors():
        lock = DirectoryLock(data_dir)
        try:
            yield _Store(data_dir)
        finally:
            lock.release()


def _report(found: Sequence[Finding], remaining: Sequence[Finding], inventory: Inventory | None) -> Report:
    if inventory is None:
        return Report(tuple(found), tuple(remaining))
    counts = len(inventory.names), len(inventory.versions), len(inventory.intact)
    return Report(tuple(found), tuple(remaining), *counts)


class _Store:
    """The parts of a data directory, for one who holds its lock."""

    def __init__(self, data_dir: Path) -> None:
        self._blobs = BlobDirectory(data_dir)
        self._path = data_dir / DATABASE
        self._backup = backup_of(self._path)
        self._quarantine = data_dir / "quarantine"

    def look(self) -> tuple[tuple[Finding, ...], Inventory | None]:
        """What is wrong, and what there is; no inventory if the database cannot say."""
        try:
            inventory = self._inventory()
        except NotOurDatabase as error:
            return (Finding(Problem.DATABASE, DATABASE, error.message),), None
        except DatabaseDamaged as error:
            copy = "can be restored" if is_sound(self._backup) else "is missing or damaged too: restore a backup"
            message = f"it is {error.reason}; the store's own copy, {self._backup.name}, {copy}"
            return (Finding(Problem.DATABASE, DATABASE, message),), None
        return tuple(findings_of(inventory)), inventory

    def _inventory(self) -> Inventory:
        if not self._path.exists():
            return self._without_rows("missing")
        with closing(Database(self._path)) as database:
            if database.is_new:
                return self._without_rows("empty")
            if database.schema_version < schema.VERSION:
                raise NotOurDatabase(f"it has schema {database.schema_version}: start the server, which upgrades it")
            database.check_integrity()
            with database.reading() as connection:
                return take_inventory(connection, self._blobs)

    def _without_rows(self, reason: str) -> Inventory:
        """As before a store's first start, unless there are files: their names have been."""
        if any(True for _ in self._blobs.digests()):
            raise DatabaseDamaged(self._path, f"{reason}, beside adapters' files")
        return Inventory((), {}, (), {}, tuple(self._blobs.leftovers()), tuple(self._blobs.banks.orphans()))

    def mend_database(self) -> tuple[Finding, ...]:
        """Rebuilds the indexes of a database that can be read, or puts the store's own copy in its place.

        What the copy does not know is in quarantine before it is in place: a server would sweep it up. Returns what
        that is, and what else does not fit the copy.
        """
        try:
            if self._reindex():
                return ()
        except NotOurDatabase:
            return ()
        except DatabaseDamaged:
            pass
        if not is_sound(self._backup):
            return ()
        with closing(read_only(self._backup)) as connection:
            inventory = take_inventory(connection, self._blobs)
        for digest in inventory.unreferenced:
            self._take(self._blobs.path(digest))
        for suffix in _DATABASE_FILES:
            self._take(self._path.with_name(DATABASE + suffix))
        copy_database(self._backup, self._path, self._blobs.tmp)
        return tuple(findings_of(inventory))

    def _reindex(self) -> bool:
        """Whether that was all it took."""
        if not self._path.exists():
            return False
        with closing(Database(self._path)) as database:
            if database.is_new:
                return False
            with database.reading() as connection:
                connection.execute("REINDEX")
            database.check_integrity()
            return True

    def mend(self, inventory: Inventory) -> None:
        """Makes rows and files agree. Files first: what no row names, a server would sweep up."""
        kept = {row.digest for row in inventory.versions if inventory.is_sound(row)}
        for digest in inventory.intact.keys() - kept:
            self._take(self._blobs.path(digest))
        if inventory.has_rows:
            with closing(Database(self._path)) as database:
                database.connection.execute("PRAGMA foreign_keys = OFF")  # one row at a time contradicts another
                with database.writing() as connection:
                    _mend_rows(connection, inventory)
        self._blobs.clear_tmp()
        self._blobs.banks.sweep()  # a bank that something in quarantine has is kept for it

    def _take(self, path: Path) -> None:
        """Moves what is there into the quarantine, beside whatever of that name is there already."""
        if not os.path.lexists(path):
            return
        make_directory(self._quarantine)
        number = 1
        while os.path.lexists(target := self._quarantine / f"{path.name}.{number}"):
            number += 1
        os.rename(path, target)
        fsync_directory(self._quarantine)
        fsync_directory(path.parent)


def is_sound(backup: Path) -> bool:
    """Whether a copy of the database can be restored by this release. It is only read."""
    if not backup.exists():
        return False
    try:
        with closing(read_only(backup)) as connection:
            (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            (owner,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error:
        return False
    return (verdict, owner) == ("ok", schema.APPLICATION_ID) and version in range(1, schema.VERSION + 1)


def _mend_rows(connection: sqlite3.Connection, inventory: Inventory) -> None:
    """Drops the versions that are lost, and gives every name with some left a current one."""
    lost = [(row.seq,) for row in inventory.versions if not inventory.is_sound(row)]
    connection.executemany("DELETE FROM versions WHERE seq = ?", lost)
    for owner in inventory.names:
        sound = inventory.sound_versions(owner)
        if not sound:
            connection.execute("DELETE FROM adapters WHERE tenant = ? AND name = ?", owner)
        elif inventory.current.get(owner) not in {row.digest for row in sound}:
            connection.execute(
                "INSERT INTO adapters (tenant, name, digest, created_at, updated_at) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (tenant, name) DO UPDATE SET digest = excluded.digest, updated_at = excluded.updated_at",
                (*owner, sound[0].digest, sound[-1].created_at, time.time()),
            )
    connection.execute(
        "DELETE FROM activations WHERE NOT EXISTS"
        " (SELECT 1 FROM adapters a WHERE a.tenant = activations.owner AND a.name = activations.name)"
    )
