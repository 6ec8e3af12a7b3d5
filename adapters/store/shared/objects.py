"""What the shared store needs of an object storage, and no more: so that a directory can stand in for a bucket.

Any method may raise StoreUnavailable, of which nobody knows whether a put has happened, and StoreError for what trying
again does not mend: refused credentials, a bucket that is not there. A put that raises anything else has not happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapters.errors import StoreError, StoreUnavailable


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object in a listing. `modified` is a Unix time, by the clock of the storage."""

    key: str
    etag: str
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Content:
    """What an object is now. No two different contents that follow one another under a key have the same `etag`."""

    data: bytes
    etag: str


class Conflict(Exception):
    """A conditional put whose condition does not hold any more."""


class AccessRefused(StoreError):
    """The storage does not let these credentials do that."""


class WriteRefused(StoreUnavailable):
    """A put that has not happened, and will not when it is tried again at once: the storage may only be read."""


class ObjectMissing(Exception):
    """There is no object under that key."""


class ObjectStore(Protocol):
    """Objects by key. An object is there whole or not at all, and what was put is what the next reader gets."""

    @property
    def url(self) -> str:
        """What messages call it."""
        ...

    def get(self, key: str, *, unless: str | None = None) -> Content | None:
        """The object; None if its etag is `unless`. Raises ObjectMissing."""
        ...

    def put(self, key: str, data: bytes, *, over: str | None) -> str:
        """Put the object in the place of the one with the etag `over`, of none for None; its etag. Raises Conflict."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Put a file's content, whatever is there."""
        ...

    def get_file(self, key: str, path: Path, size: int) -> None:
        """Write an object of `size` bytes to a new file. Raises ObjectMissing, StoreError if it is of another size."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose keys begin with `prefix` and a slash, in any order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object, if there is one."""
        ...
