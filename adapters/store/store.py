"""AdapterStore: every change on the disk before it is acknowledged, and nothing half-done ever listed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from adapters.errors import StorageFull, StoreError
from adapters.store import schema
from adapters.store.backup import Backup
from adapters.store.blobs import BlobDirectory
from adapters.store.catalog import Catalog
from adapters.store.database import CommitUncertain, Database, DatabaseDamaged
from adapters.store.files import make_directory, storage_errors
from adapters.store.lock import DirectoryLock
from adapters.store.names import check_name, is_name
from adapters.store.outcomes import check_keep, check_mode, check_page, exists, files_gone, not_found
from adapters.store.records import SHARED, Activation, AdapterRecord, AdapterVersion, Page
from adapters.store.reserve import Reserve

logger = logging.getLogger(__name__)

PRIVATE_DIRECTORIES = ("blobs", "tmp", "quarantine")

_ROWS_AT_A_TIME = 500


class AdapterStore:
    """A data directory, owned by this process until `close`. Every method may be called from any thread.

    `directories` are those in it with adapters' files, of all tenants: nobody's to read but by name.
    Digests are written "sha256:<64 hex>" here as everywhere. Names belong to tenants; "" is the shared tenant.
    When a method returns, what it did survives the process and, as far as the disk keeps its word, the power.

    Any method may raise StoreError when the disk or the database fails: StorageFull when it is full (nothing has
    changed then), StoreCorrupt when it is damaged.
    """

    checked_at_start = True
    url: str | None = None

    def __init__(self, data_dir: Path, *, keep_versions: int = 5, reserved: Collection[str] = frozenset()) -> None:
        """Open the store, creating or upgrading it, and sweep up what a killed process left.

        `keep_versions` counts the current one; `reserved` are names that no adapter may have besides "base".
        Raises StoreError when another process owns the directory, StoreCorrupt when its database is damaged,
        foreign, missing beside existing files, or of a newer release.
        """
        check_keep(keep_versions)
        self._keep_versions = keep_versions
        self._reserved = frozenset(reserved)
        self._lock = threading.RLock()  # around every use of the connection, and every change of blobs/
        data_dir = data_dir.absolute()
        self.directories = tuple(data_dir / name for name in PRIVATE_DIRECTORIES)
        with ExitStack() as opened, storage_errors():
            make_directory(data_dir)
            opened.callback(DirectoryLock(data_dir).release)
            self._blobs = BlobDirectory(data_dir)
            leftovers = self._blobs.clear_tmp()  # before the database opens: this may be the room that it needs
            self._database = Database(data_dir / "store.sqlite3")
            opened.callback(self._database.close)
            self._refuse_lost_database()
            self._backup = Backup(self._database.path, self._blobs.tmp)
            self._upgrade()
            self._database.check_references()  # else the files of rows that are lost would be swept up
            with self._reading() as catalog:
                orphans = self._blobs.sweep(catalog.digests())
            leftovers += self._blobs.banks.sweep()  # the last: what was swept may have been all that had them
            self._reserve = Reserve(data_dir / "reserve")
            self._reserve.fill()
            self._backup.write()
            opened.callback(self._backup.write_if_changed)
            self._opened = opened.pop_all()
        if leftovers or orphans:
            logger.info("swept up %d leftovers and %d unreferenced adapters' files", leftovers, orphans)

    def close(self) -> None:
        """Give the directory back. Calling it again does nothing."""
        with self._lock:
            self._opened.close()

    def staging(self) -> AbstractContextManager[Path]:
        """A private directory to write an adapter's files into; gone when the block ends, unless published.

        A disk that fills up inside the block is StorageFull.
        """
        return self._blobs.staging()

    def publish(
        self, tenant: str, name: str, staged: Path, info: Mapping[str, Any], *, replace: bool = False
    ) -> AdapterRecord:
        """Store the files of a directory from `staging` under a name, and make them its current version.

        With `replace` a name that exists gets a new version. The same files as the current version change
        nothing; the same files as an earlier version make that one the newest. Versions beyond `keep_versions`
        are forgotten, oldest first. `info` is stored as JSON.

        Raises InvalidName, UnsupportedCheckpoint (no files, or anything but plain files), AdapterExists.
        """
        check_name(name, self._reserved)
        with storage_errors():
            digest, file_bytes = self._blobs.seal(staged)  # slow, and nobody else's business: no lock yet
        version = AdapterVersion(digest, time.time(), file_bytes, info)
        with self._lock:
            try:
                record, pruned = self._record(tenant, name, staged, version, replace)
            except CommitUncertain:
                raise  # the row may be there after a restart, so its files must be; if not, the restart sweeps
            except BaseException:
                self._drop_unreferenced([digest])
                raise
            self._drop_unreferenced(pruned)
        self._backup.note_change()
        return record

    def get(self, tenant: str, name: str) -> AdapterRecord:
        """The adapter of that name. Raises AdapterNotFound."""
        with self._reading() as catalog:
            return _find(catalog, tenant, name)

    def visible(self, tenant: str, name: str) -> AdapterRecord:
        """The tenant's adapter of that name, else the shared one. Raises AdapterNotFound."""
        with self._reading() as catalog:
            return _find_visible(catalog, tenant, name)

    def version(self, tenant: str, name: str, digest_prefix: str | None = None) -> AdapterVersion:
        """The version whose digest starts with `digest_prefix` ("sha256:" and at least 8 digits), or the current.

        Raises AdapterNotFound, or InvalidSelection for a prefix that is malformed or ambiguous.
        """
        record = self.get(tenant, name)
        return record.version(record.digest if digest_prefix is None else digest_prefix)

    def list(self, tenant: str, *, limit: int = 100, after: str | None = None) -> Page:
        """Up to `limit` adapters in order of name, from the first after `after`, and the `after` of the next page.

        They are those visible to the tenant: its own, and the shared ones whose names it has not used. The name to
        continue after need not exist any more; the last page's is None. Raises InvalidSelection for an `after` that
        cannot be a name.
        """
        check_page(limit, after)
        with self._reading() as catalog:
            return catalog.page(tenant, limit, after or "")

    def names(self, tenant: str) -> Sequence[tuple[str, float]]:
        """(name, Unix time of its creation) of every adapter visible to the tenant, in order of name.

        All at once, and little of each: a page's records carry every version with its info.
        """
        with self._reading() as catalog:
            return catalog.names(tenant)

    def count(self, tenant: str) -> int:
        """How many adapters the tenant has."""
        with self._reading() as catalog:
            return catalog.count(tenant)

    def delete(self, tenant: str, name: str) -> AdapterRecord:
        """Deactivate and forget an adapter with all its versions; what it was. Raises AdapterNotFound."""
        with self._lock:
            try:
                record = self._forget(tenant, name)
            except StorageFull:
                self._reserve.release()
                record = self._forget(tenant, name)
            self._drop_unreferenced(version.digest for version in record.versions)
            self._reserve.fill()
        self._backup.note_change()
        return record

    def rollback(self, tenant: str, name: str, digest_prefix: str) -> AdapterRecord:
        """Make an earlier version current. The order of the versions stays as it is.

        Raises AdapterNotFound, InvalidSelection for a prefix that is malformed or ambiguous, AdapterUnavailable
        when the version's files are gone.
        """
        with self._writing() as catalog:
            record = _find(catalog, tenant, name)
            version = record.version(digest_prefix)
            if not self.path(version.digest).is_dir():
                raise files_gone(name, version.digest)
            if version.digest != record.digest:
                catalog.make_current(tenant, name, version.digest, time.time())
            record = _find(catalog, tenant, name)
        self._backup.note_change()
        return record

    def activate(self, tenant: str, name: str, mode: str) -> Activation:
        """Make an adapter visible to the tenant its default, in place of any other.

        Raises AdapterNotFound, or InvalidSelection for a mode that is neither "switch" nor "merge".
        """
        check_mode(mode)
        with self._writing() as catalog:
            activation = Activation(tenant, name, mode, _find_visible(catalog, tenant, name).tenant)
            catalog.activate(activation)
        self._backup.note_change()
        return activation

    def reactivate(self, activation: Activation) -> None:
        """Make the tenant's default what it was: that very adapter, whatever the tenant sees under its name by now.

        One that has been deleted meanwhile leaves the tenant without a default.
        """
        with self._writing() as catalog:
            if catalog.find(activation.owner, activation.name) is not None:
                catalog.activate(activation)
            elif (current := catalog.active(activation.tenant)) is not None:
                catalog.deactivate(activation.tenant, current.name)
        self._backup.note_change()

    def deactivate(self, tenant: str, name: str) -> bool:
        """Leave the tenant without a default; whether that adapter, existing or not, was it."""
        with self._writing() as catalog:
            was_active = is_name(name) and catalog.deactivate(tenant, name)
        self._backup.note_change()
        return was_active

    def active(self, tenant: str) -> Activation | None:
        """The tenant's default."""
        with self._reading() as catalog:
            return catalog.active(tenant)

    def all_versions(self) -> Iterator[tuple[str, str, AdapterVersion]]:
        """Every version of every adapter, oldest first: (tenant, name, version).

        A version whose files are missing is among them: whoever loads it finds out, and can say so. What is
        published meanwhile appears at the end.
        """
        seq = 0
        while True:
            with self._reading() as catalog:
                rows = catalog.versions_after(seq, _ROWS_AT_A_TIME)
            if not rows:
                return
            for _, tenant, name, version in rows:
                yield tenant, name, version
            seq = rows[-1][0]

    def path(self, digest: str) -> Path:
        """The directory with the files of that digest, if they are stored. Raises InvalidSelection."""
        return self._blobs.path(digest)

    def fetch(self, digest: str) -> Path:
        """The same: they are here, or nowhere."""
        return self.path(digest)

    @contextmanager
    def reading(self, digest: str) -> Iterator[Path]:
        """The same, for a block that reads them; nothing is cleared away to make room."""
        yield self.path(digest)

    def infos(self, digest: str) -> Sequence[Mapping[str, Any]]:
        """The `info` of every version with that digest, oldest first."""
        with self._reading() as catalog:
            return catalog.infos(digest)

    def digest_in_use(self, digest: str) -> bool:
        """Whether any version of any adapter has that digest."""
        with self._reading() as catalog:
            return catalog.refers_to(digest)

    def health(self) -> None:
        """Nobody else changes it."""

    def _record(
        self, tenant: str, name: str, staged: Path, version: AdapterVersion, replace: bool
    ) -> tuple[AdapterRecord, Sequence[str]]:
        """The transaction of `publish`: the record as it is now, and the digests that it has forgotten."""
        pruned: Sequence[str] = ()
        with self._writing() as catalog:
            existing = catalog.find(tenant, name)
            if existing is not None and not replace:
                raise exists(existing, version.digest)
            self._blobs.place(staged, version.digest)
            if existing is None or existing.digest != version.digest:
                catalog.put(tenant, name, version)
                pruned = catalog.prune(tenant, name, self._keep_versions)
            return _find(catalog, tenant, name), pruned

    def _forget(self, tenant: str, name: str) -> AdapterRecord:
        """The transaction of `delete`."""
        with self._writing() as catalog:
            record = _find(catalog, tenant, name)
            catalog.delete(tenant, name)
        return record

    def _drop_unreferenced(self, digests: Iterable[str]) -> None:
        """Remove the files that no version has any more. The caller holds the lock since it changed the rows.

        What this cannot remove, the next start does: the change itself stands.
        """
        for digest in digests:
            try:
                if not self.digest_in_use(digest):
                    self._blobs.remove(digest)
            except (OSError, StoreError) as error:
                logger.warning("the files of %s stay until the next start: %s", digest, error)

    def _upgrade(self) -> None:
        version = self._database.schema_version
        if 0 < version < schema.VERSION:
            self._backup.keep_before_upgrade(version)
        self._database.migrate()

    def _refuse_lost_database(self) -> None:
        """Without this, a lost database would make every adapter on the disk an orphan, and sweep it."""
        if self._database.is_new and any(True for _ in self._blobs.digests()):
            raise DatabaseDamaged(self._database.path, f"missing or empty, but {self._blobs.root} has adapters")

    @contextmanager
    def _reading(self) -> Iterator[Catalog]:
        with self._lock, self._database.reading() as connection:
            yield Catalog(connection)

    @contextmanager
    def _writing(self) -> Iterator[Catalog]:
        with self._lock, storage_errors(), self._database.writing() as connection:
            yield Catalog(connection)


def _find(catalog: Catalog, tenant: str, name: str) -> AdapterRecord:
    record = catalog.find(tenant, name) if is_name(name) else None
    if record is None:
        raise not_found(name)
    return record


def _find_visible(catalog: Catalog, tenant: str, name: str) -> AdapterRecord:
    if tenant != SHARED and is_name(name) and (own := catalog.find(tenant, name)) is not None:
        return own
    return _find(catalog, SHARED, name)
