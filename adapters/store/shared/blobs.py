"""Adapters' files in the shared store, by digest: put before any manifest names them, and never changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import StoreUnavailable
from adapters.split_file import file_size
from adapters.store.files import uploaded_files
from adapters.store.shared import keys
from adapters.store.shared.objects import ObjectInfo, ObjectMissing, ObjectStore


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """The files under one digest. `modified` is when the last of them was put, a Unix time of the storage's."""

    digest: str
    files: Mapping[str, ObjectInfo]

    @property
    def modified(self) -> float:
        return max(info.modified for info in self.files.values())


class SharedBlobs:
    """`blobs/sha256/<hex>/<file>` in the store."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def put(self, digest: str, directory: Path) -> None:
        """Puts a directory's files, again if they are there: what is being collected as garbage stays so."""
        for path in uploaded_files(directory):
            self._objects.put_file(keys.blob_key(digest, path.name), path)

    def has(self, digest: str, directory: Path) -> bool:
        """Whether all files of a directory are there, in their sizes."""
        stored = self.files(digest)
        return all(
            path.name in stored and stored[path.name].size == file_size(path) for path in uploaded_files(directory)
        )

    def files(self, digest: str) -> Mapping[str, ObjectInfo]:
        """What is stored under a digest, by the files' names. Raises StoreError."""
        found = {}
        for info in self._objects.list(keys.blob_prefix(digest)):
            if (place := keys.file_of(info.key)) is not None:
                found[place[1]] = info
        return found

    def bring(self, digest: str, directory: Path) -> None:
        """Writes the files into an empty directory; whether they are what the digest says is for the caller to see.

        Raises StoreUnavailable if there are none.
        """
        files = self.files(digest)
        try:
            for name, info in files.items():
                self._objects.get_file(info.key, directory / name, info.size)
        except ObjectMissing as error:
            raise self.missing(digest) from error
        if not files:
            raise self.missing(digest)

    def missing(self, digest: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"the files of {digest} are missing from {self._objects.url}: upload the adapter again, or put them back",
            subject=digest,
        )

    def all(self) -> Iterator[StoredFiles]:
        """Every digest that has files. Raises StoreError."""
        found: dict[str, dict[str, ObjectInfo]] = {}
        for info in self._objects.list(keys.BLOBS):
            if (place := keys.file_of(info.key)) is not None:
                found.setdefault(place[0], {})[place[1]] = info
        return iter([StoredFiles(digest, files) for digest, files in sorted(found.items())])

    def remove(self, digest: str) -> None:
        for info in self.files(digest).values():
            self._objects.delete(info.key)
