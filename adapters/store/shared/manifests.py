"""All tenants' manifests as they are known here, and how they are changed: compare, swap, and again.

Reading asks nobody. `refresh` brings what others have changed; `change` begins with the latest manifest, so that what
it refuses is refused for good reason. One object is replaced at a time and whole: nobody sees half of a change.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from adapters.errors import StoreCorrupt, StoreError, StoreUnavailable
from adapters.store.shared import keys
from adapters.store.shared.changes import Changed
from adapters.store.shared.manifest import Manifest, decode, encode
from adapters.store.shared.objects import Conflict, ObjectMissing, ObjectStore, WriteRefused

log = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Known:
    """A manifest as it was last read or written; `etag` is None for one that is not there yet."""

    manifest: Manifest
    etag: str | None


class Manifests:
    """`changed(before, after)` is called after each replacement of a manifest that is known here."""

    def __init__(
        self,
        objects: ObjectStore,
        changed: Callable[[Manifest, Manifest], None] = lambda before, after: None,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        write_timeout_s: float = WRITE_TIMEOUT_S,
    ) -> None:
        self._objects = objects
        self._changed = changed
        self._clock = clock
        self._pause = pause
        self._write_timeout_s = write_timeout_s
        self._known: dict[str, _Known] = {}
        # Around each look at a manifest in the store and what is made of it: what is known never goes back in time.
        self._locks: dict[str, threading.RLock] = {}

    def of(self, tenant: str) -> Manifest:
        """As it is known here."""
        known = self._known.get(tenant)
        return Manifest(tenant) if known is None else known.manifest

    def all(self) -> list[Manifest]:
        return [known.manifest for known in list(self._known.values())]

    def refers_to(self, digest: str) -> bool:
        """Whether any version known here has that digest."""
        return any(digest in manifest.by_digest for manifest in self.all())

    def refresh(self) -> None:
        """Brings every manifest up to date; all that can be, before the first error is raised. Raises StoreError."""
        failure: StoreError | None = None
        listed: set[str] = set()
        for info in self._objects.list(keys.TENANTS):
            tenant = keys.tenant_of(info.key)
            if tenant is None:
                log.warning("%s in %s is no manifest: it is passed over", info.key, self._objects.url)
                continue
            listed.add(tenant)
            known = self._known.get(tenant)
            if known is None or known.etag != info.etag:
                try:
                    self.latest(tenant)
                except StoreError as error:
                    failure = failure or error
        # They are never removed: a bucket that was emptied or exchanged must not look like adapters deleted.
        if lost := [tenant for tenant, known in list(self._known.items()) if known.etag and tenant not in listed]:
            failure = failure or _lost(lost[0], self._objects)
        if failure is not None:
            raise failure

    def latest(self, tenant: str) -> Manifest:
        """The manifest as it is in the store now. Raises StoreError."""
        with self._lock_of(tenant):
            return self._read(tenant).manifest

    def change(self, tenant: str, change: Callable[[Manifest], Changed[T]]) -> T:
        """Makes a change to the latest manifest; what it answered. Raises what `change` does, and nothing has changed.

        Raises StoreUnavailable, too: before anything was written, or when it cannot be found out what has become of it.
        """
        with self._lock_of(tenant):
            return self._change(tenant, change, secrets.token_hex(8))

    def _lock_of(self, tenant: str) -> threading.RLock:
        return self._locks.setdefault(tenant, threading.RLock())

    def _change(self, tenant: str, change: Callable[[Manifest], Changed[T]], write: str) -> T:
        """An attempt that got no answer and one after it have the same `write`: if either is in, the change is."""
        known, uncertain = self._read(tenant), False
        for _ in self._attempts():
            after, answer = change(known.manifest)
            if after is known.manifest:
                return answer
            after = after.stamped(write)
            try:
                etag = self._objects.put(keys.manifest_key(tenant), encode(after), over=known.etag)
            except WriteRefused:
                if uncertain:
                    raise _unknown_outcome(self._objects) from None
                raise
            except (Conflict, StoreUnavailable) as error:
                uncertain = uncertain or isinstance(error, StoreUnavailable)
                known = self._read_again(tenant)
                if write in known.manifest.recent:
                    return answer
            else:
                self._install(tenant, _Known(after, etag))
                return answer
        if uncertain:
            raise _unknown_outcome(self._objects)
        raise StoreUnavailable(f"too many others write to {self._objects.url} at this moment; try again")

    def _read_again(self, tenant: str) -> _Known:
        """After a put that may have happened. Raises StoreUnavailable when the store does not say in time."""
        for _ in self._attempts():
            try:
                return self._read(tenant)
            except StoreUnavailable as error:
                failure = error
        raise _unknown_outcome(self._objects) from failure

    def _attempts(self) -> Iterator[None]:
        """One now, and more after pauses that grow and differ, until the time is over."""
        end, longest = self._clock() + self._write_timeout_s, _FIRST_PAUSE_S
        while True:
            yield
            if self._clock() >= end:
                return
            self._pause(random.uniform(0, longest))
            longest = min(2 * longest, _LONGEST_PAUSE_S)

    def _read(self, tenant: str) -> _Known:
        """The latest. The caller holds the tenant's lock."""
        known = self._known.get(tenant)
        key, etag = keys.manifest_key(tenant), known.etag if known else None
        try:
            content = self._objects.get(key, unless=etag)
        except ObjectMissing as error:
            if etag is not None:
                raise _lost(tenant, self._objects) from error
            return _Known(Manifest(tenant), None)
        if content is None:
            assert known is not None
            return known
        read = _Known(decode(content.data, tenant), content.etag)
        if known is not None and read.manifest.generation < known.manifest.generation:
            log.warning(
                "%s went back from generation %d to %d: somebody has put an earlier version of it back",
                key, known.manifest.generation, read.manifest.generation,
            )  # fmt: skip
        self._install(tenant, read)
        return read

    def _install(self, tenant: str, known: _Known) -> None:
        before = self.of(tenant)
        self._known[tenant] = known
        if before.write != known.manifest.write or before.generation != known.manifest.generation:
            self._changed(before, known.manifest)


def _lost(tenant: str, objects: ObjectStore) -> StoreCorrupt:
    return StoreCorrupt(
        f"{keys.manifest_key(tenant)} is gone from {objects.url}: put it back; what is known of it here is served on"
    )


def _unknown_outcome(objects: ObjectStore) -> StoreUnavailable:
    return StoreUnavailable(
        f"{objects.url} does not answer, and whether the change was made is not known: look at the adapter before you "
        "try again"
    )
