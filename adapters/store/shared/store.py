"""SharedAdapterStore: what AdapterStore does, for many servers at once."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from adapters.errors import AdapterNotFound, StoreError, StoreUnavailable
from adapters.store import files
from adapters.store.names import check_name, is_name
from adapters.store.outcomes import check_keep, check_mode, check_page, exists, files_gone, not_found
from adapters.store.records import SHARED, Activation, AdapterRecord, AdapterVersion, Page
from adapters.store.seam import StoreHealth
from adapters.store.shared import changes
from adapters.store.shared.blobs import SharedBlobs
from adapters.store.shared.cache import BlobCache
from adapters.store.shared.manifest import Manifest
from adapters.store.shared.manifests import Manifests
from adapters.store.shared.objects import ObjectStore

log = logging.getLogger(__name__)

PRIVATE_DIRECTORIES = ("blobs", "tmp", "quarantine", "shared")

Listener = Callable[[Collection[str]], None]
"""Is told the digests of versions that were added, changed or forgotten, here or elsewhere."""


class SharedAdapterStore:
    """An object storage that many servers use, seen from one of them. The methods promise what AdapterStore's do.

    Reads of names answer at once from memory, which a thread brings up to date every `refresh_s`; what is written here
    is seen here at once, and what others write after `refresh_s` and the time a request takes. Files are brought when
    they are used first. While the storage does not answer, what is known and on this machine is served on, and changes
    raise StoreUnavailable.
    """

    checked_at_start = False

    def __init__(
        self,
        objects: ObjectStore,
        data_dir: Path,
        *,
        cache_bytes: int,
        refresh_s: float = 1.0,
        keep_versions: int = 5,
        reserved: Collection[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads every manifest, and begins to refresh them. Raises StoreError: without them there is nothing to serve.

        `data_dir` is for copies of files: several processes of one machine may have the same.
        """
        check_keep(keep_versions)
        self.url: str | None = objects.url
        self._keep_versions = keep_versions
        self._reserved = frozenset(reserved)
        self._clock = clock
        self._errors = 0
        self._away: str | None = None  # what the last refresh said, if it failed
        self._listeners: list[Listener] = []
        data_dir = data_dir.absolute()
        self.directories = tuple(data_dir / name for name in PRIVATE_DIRECTORIES)
        if (root := getattr(objects, "root", None)) is not None:
            self.directories += (root,)
        self._manifests = Manifests(objects, self._tell)
        self._blobs = SharedBlobs(objects)
        self._manifests.refresh()
        self._refreshed_at = clock()
        self._cache = BlobCache(data_dir / "shared", cache_bytes)
        self._closed = threading.Event()
        self._refresher = threading.Thread(
            target=self._refresh_until_closed, args=(refresh_s,), name="store-refresh", daemon=True
        )
        self._refresher.start()

    def close(self) -> None:
        """End refreshing. Calling it again does nothing."""
        self._closed.set()
        if self._refresher is not threading.current_thread():
            self._refresher.join()
        self._cache.close()

    def listen(self, listener: Listener) -> None:
        """Have changes told, by whichever thread sees them; it must not wait for long."""
        self._listeners.append(listener)

    def refresh(self) -> None:
        """See what others have changed so far, now. Raises StoreError."""
        try:
            self._manifests.refresh()
        except StoreError as error:
            self._errors += 1
            self._away = error.message if isinstance(error, StoreUnavailable) else None
            raise
        self._away = None
        self._refreshed_at = self._clock()

    def health(self) -> StoreHealth:
        return StoreHealth(self._clock() - self._refreshed_at, self._errors)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private directory on this machine to write an adapter's files into, gone when the block ends."""
        with files.storage_errors():
            directory = Path(tempfile.mkdtemp(prefix="staging-", dir=self._cache.tmp))
        try:
            yield directory
        except OSError as error:
            if files.is_full(error):
                raise files.storage_full() from error
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def publish(
        self, tenant: str, name: str, staged: Path, info: Mapping[str, Any], *, replace: bool = False
    ) -> AdapterRecord:
        """The files are in the store before the name is, and still are once it is."""
        check_name(name, self._reserved)
        assert staged.is_relative_to(self._cache.tmp), "only what was staged here can be renamed into place"
        with files.storage_errors():
            files.make_private(staged)
            digest, file_bytes = files.digest_of(staged), files.size_of(staged)
        version = AdapterVersion(digest, time.time(), file_bytes, json.loads(json.dumps(dict(info), allow_nan=False)))
        with self._asking():
            if not replace and (entry := self._manifests.latest(tenant).adapters.get(name)) is not None:
                raise exists(entry.record, digest)  # before anything is sent
            self._blobs.put(digest, staged)
            publish = partial(
                changes.published, name=name, version=version, id=secrets.token_hex(8),
                replacing=replace, keep=self._keep_versions,
            )  # fmt: skip
            record = self._manifests.change(tenant, publish)
            try:
                self._keep_files(digest, staged)
            except StoreUnavailable as error:
                raise StoreUnavailable(
                    f"{name!r} is published, but whether its files are all there is not known ({error.message}): look "
                    "at the adapter, and upload it again with replace=true if it cannot be served",
                    subject=name,
                ) from error
        with suppress(OSError):
            self._cache.place(staged, digest)
        return record

    def get(self, tenant: str, name: str) -> AdapterRecord:
        return changes.find(self._manifests.of(tenant), name).record

    def visible(self, tenant: str, name: str) -> AdapterRecord:
        own = self._manifests.of(tenant).adapters.get(name)
        return own.record if own is not None else self.get(SHARED, name)

    def version(self, tenant: str, name: str, digest_prefix: str | None = None) -> AdapterVersion:
        record = self.get(tenant, name)
        return record.version(record.digest if digest_prefix is None else digest_prefix)

    def list(self, tenant: str, *, limit: int = 100, after: str | None = None) -> Page:
        check_page(limit, after)
        own, shared = self._manifests.of(tenant), self._manifests.of(SHARED)
        found = {name: manifest.adapters[name].record for manifest in (shared, own)
                 for name in _following(manifest, after or "", limit + 1)}  # fmt: skip
        names = sorted(found)
        records = [found[name] for name in names[:limit]]
        return records, records[-1].name if len(names) > limit else None

    def names(self, tenant: str) -> Sequence[tuple[str, float]]:
        own, shared = self._manifests.of(tenant).adapters, self._manifests.of(SHARED).adapters
        return [(name, entry.record.created_at) for name, entry in sorted({**shared, **own}.items())]

    def count(self, tenant: str) -> int:
        return len(self._manifests.of(tenant).adapters)

    def delete(self, tenant: str, name: str) -> AdapterRecord:
        """The files stay in the store until `doctor` collects them; here they go at once."""
        with self._asking():
            return self._manifests.change(tenant, partial(changes.deleted, name=_checked(name)))

    def rollback(self, tenant: str, name: str, digest_prefix: str) -> AdapterRecord:
        with self._asking():
            record = changes.find(self._manifests.latest(tenant), _checked(name)).record
            digest = record.version(digest_prefix).digest
            if not self._blobs.files(digest):
                raise files_gone(name, digest)
            make = partial(changes.made_current, name=name, digest=digest, now=time.time())
            return self._manifests.change(tenant, make)

    def activate(self, tenant: str, name: str, mode: str) -> Activation:
        check_mode(mode)
        with self._asking():
            activate = partial(changes.activated, name=_checked(name), mode=mode, shared=self._latest_shared(tenant))
            return self._manifests.change(tenant, activate)

    def reactivate(self, activation: Activation) -> None:
        with self._asking():
            shared = self._latest_shared(activation.tenant)
            self._manifests.change(
                activation.tenant, partial(changes.reactivated, activation=activation, shared=shared)
            )

    def deactivate(self, tenant: str, name: str) -> bool:
        if not is_name(name):
            return False
        with self._asking():
            self._latest_shared(tenant)
            was_active = self._active_in(self._manifests.latest(tenant)) is not None
            return self._manifests.change(tenant, partial(changes.deactivated, name=name)) and was_active

    def active(self, tenant: str) -> Activation | None:
        return self._active_in(self._manifests.of(tenant))

    def all_versions(self) -> Iterator[tuple[str, str, AdapterVersion]]:
        """Of those known here when it is called."""
        found = [
            (manifest.tenant, name, version)
            for manifest in self._manifests.all()
            for name, entry in manifest.adapters.items()
            for version in entry.record.versions
        ]
        return iter(sorted(found, key=lambda each: each[2].created_at))

    def path(self, digest: str) -> Path:
        return self._cache.path(digest)

    def fetch(self, digest: str) -> Path:
        with self._counted(), self._cache.reading(digest, partial(self._bring, digest), verify=False) as path:
            return path

    @contextmanager
    def reading(self, digest: str) -> Iterator[Path]:
        reading = self._cache.reading(digest, partial(self._bring, digest))
        with self._counted():
            path = reading.__enter__()
        try:
            yield path
        finally:
            reading.__exit__(None, None, None)

    def infos(self, digest: str) -> Sequence[Mapping[str, Any]]:
        return [version.info for manifest in self._manifests.all() for version in manifest.by_digest.get(digest, ())]

    def digest_in_use(self, digest: str) -> bool:
        return self._manifests.refers_to(digest)

    def _bring(self, digest: str, directory: Path) -> None:
        """Raises AdapterNotFound for files that no version known here has: nobody gets a deleted adapter's."""
        if not self._manifests.refers_to(digest):
            raise AdapterNotFound("the adapter was deleted", subject=digest)
        self._refuse_while_away()
        self._blobs.bring(digest, directory)

    def _keep_files(self, digest: str, staged: Path) -> None:
        """A collector that saw them unnamed may have removed them while they were named."""
        if not self._blobs.has(digest, staged):
            log.warning("the files of %s were collected while they were published; storing them again", digest)
            self._blobs.put(digest, staged)

    def _refuse_while_away(self) -> None:
        if self._away is not None:
            raise StoreUnavailable(self._away)

    def _latest_shared(self, tenant: str) -> Manifest:
        return self._manifests.latest(SHARED) if tenant != SHARED else self._manifests.of(SHARED)

    def _active_in(self, manifest: Manifest) -> Activation | None:
        """The default, unless the adapter that it was set to is gone, whoever has its name by now."""
        active = manifest.active
        if active is None:
            return None
        owner = manifest if active.activation.owner == manifest.tenant else self._manifests.of(active.activation.owner)
        entry = owner.adapters.get(active.activation.name)
        return active.activation if entry is not None and entry.id == active.id else None

    def _tell(self, before: Manifest, after: Manifest) -> None:
        """Drops the copies of files that no version has any more, and tells whoever listens."""
        old, new = before.by_digest, after.by_digest
        changed = [digest for digest in old.keys() | new.keys() if old.get(digest) != new.get(digest)]
        if not changed:
            return
        for digest in changed:
            if digest not in new and not self._manifests.refers_to(digest):
                self._cache.drop(digest)
        for listener in self._listeners:
            listener(changed)

    def _refresh_until_closed(self, interval_s: float) -> None:
        told = False
        while not self._closed.wait(interval_s):
            try:
                self.refresh()
            except Exception as error:  # the thread must not end: the store may be back the next time
                if not told:
                    log.warning("serving what is known: %s", error, exc_info=not isinstance(error, StoreError))
                told = True
            else:
                if told:
                    log.info("the shared store answers again")
                told = False

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Around changes. Refused at once while refreshing fails: others would miss the threads that waited."""
        with self._counted():
            self._refuse_while_away()
            yield

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            if error.code in _FAILURES:
                self._errors += 1
            raise


_FAILURES = ("store_unavailable", "storage_full", "internal_error")


def _checked(name: str) -> str:
    if not is_name(name):
        raise not_found(name)
    return name


def _following(manifest: Manifest, after: str, most: int) -> Sequence[str]:
    names = manifest.names
    begin = bisect_right(names, after)
    return names[begin : begin + most]
