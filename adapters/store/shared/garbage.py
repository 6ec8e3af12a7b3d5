"""A shared store checked as a whole, and the files in it that nothing names collected. Servers may run on it meanwhile.

Files are garbage when no manifest has named them for a while: before that they may belong to an upload in progress. A
publication of the same files puts them again, which makes them new, and sees to it that they are there once they are
named. A collector looks once more after a removal, and puts back what has been named meanwhile: one of the two sees the
other, whatever their order. Nothing else is ever removed here.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from adapters.errors import StoreCorrupt, StoreError, StoreUnavailable
from adapters.store.files import digest_of
from adapters.store.inventory import Finding, Problem
from adapters.store.repair import Report
from adapters.store.shared import keys
from adapters.store.shared.blobs import SharedBlobs, StoredFiles
from adapters.store.shared.manifests import Manifests
from adapters.store.shared.objects import ObjectStore

GRACE_S = 3600.0


def examine(objects: ObjectStore, *, grace_s: float = GRACE_S) -> Report:
    """Checks every manifest, and every file that it names, against its digest. Raises StoreError."""
    store = _Store(objects, grace_s)
    found = store.look()
    return store.report(found, found)


def repair(objects: ObjectStore, *, grace_s: float = GRACE_S) -> Report:
    """Checks, and collects files that no manifest has named for `grace_s`: none at all if a manifest is unreadable.

    Lost and damaged files are beyond repair here: whoever has the adapter uploads it again. Raises StoreError.
    """
    store = _Store(objects, grace_s)
    found = store.look()
    remaining = [finding for finding in found if not store.mend(finding)]
    return store.report(found, remaining)


class _Store:
    def __init__(self, objects: ObjectStore, grace_s: float) -> None:
        self._objects = objects
        self._grace_s = grace_s
        self._manifests = Manifests(objects)
        self._blobs = SharedBlobs(objects)
        self._all_read = True
        self._files = 0

    def look(self) -> list[Finding]:
        """Files first, names after: what is published in between is named."""
        stored = {files.digest: files for files in self._blobs.all()}
        self._files = len(stored)
        found = list(self._unreadable())
        found += self._of_versions(stored)
        found += self._of_garbage(stored)
        return found

    def mend(self, finding: Finding) -> bool:
        """Whether the finding has been repaired."""
        if finding.problem is not Problem.UNREFERENCED or not self._all_read:
            return False
        digest = finding.subject
        self._manifests.refresh()
        files = self._blobs.files(digest)
        if files and not self._manifests.refers_to(digest) and self._is_old(StoredFiles(digest, files)):
            self._collect(digest)
        return True

    def report(self, found: Sequence[Finding], remaining: Sequence[Finding]) -> Report:
        manifests = self._manifests.all()
        adapters = sum(len(manifest.adapters) for manifest in manifests)
        versions = sum(len(manifest.versions()) for manifest in manifests)
        return Report(tuple(found), tuple(remaining), adapters, versions, self._files - (len(found) - len(remaining)))

    def _unreadable(self) -> Iterator[Finding]:
        for info in self._objects.list(keys.TENANTS):
            tenant = keys.tenant_of(info.key)
            try:
                if tenant is not None:
                    self._manifests.latest(tenant)
                    continue
                message = "it is no manifest of a tenant: move it elsewhere"
            except StoreCorrupt as error:
                message = error.message
            self._all_read = False
            yield Finding(Problem.MANIFEST, info.key, message)

    def _of_versions(self, stored: dict[str, StoredFiles]) -> Iterator[Finding]:
        intact: dict[str, bool] = {}
        for manifest in self._manifests.all():
            for name, entry in manifest.adapters.items():
                shown = f"{manifest.tenant}/{name}" if manifest.tenant else name
                for version in entry.record.versions:
                    digest = version.digest
                    if digest not in stored and not self._blobs.files(digest):
                        yield Finding(Problem.MISSING, shown, f"the files of its version {digest} are gone")
                        continue
                    if digest not in intact:
                        intact[digest] = self._is_intact(digest)
                    if not intact[digest]:
                        message = f"the files of its version {digest} are not what was uploaded"
                        yield Finding(Problem.DAMAGED, shown, message)

    def _of_garbage(self, stored: dict[str, StoredFiles]) -> Iterator[Finding]:
        for digest, files in stored.items():
            if not self._manifests.refers_to(digest) and self._is_old(files):
                yield Finding(Problem.UNREFERENCED, digest, "no adapter has these files")

    def _is_old(self, files: StoredFiles) -> bool:
        return files.modified < time.time() - self._grace_s

    def _is_intact(self, digest: str) -> bool:
        with tempfile.TemporaryDirectory() as directory:
            try:
                self._blobs.bring(digest, Path(directory))
                return digest_of(Path(directory)) == digest
            except StoreUnavailable:
                raise
            except StoreError:
                return False

    def _collect(self, digest: str) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self._blobs.bring(digest, Path(directory))
            self._blobs.remove(digest)
            self._manifests.refresh()
            if self._manifests.refers_to(digest):
                self._blobs.put(digest, Path(directory))
