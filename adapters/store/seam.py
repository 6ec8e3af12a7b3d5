"""What registry and routes ask of an adapter store, whether one process owns it or many replicas share it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters.store.records import Activation, AdapterRecord, AdapterVersion, Page


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """Of a shared store: how old what is known here may be, in seconds, and its failures since the start."""

    refresh_age_s: float
    errors: int


class Store(Protocol):
    """Adapters' files by digest; names, versions and activations by tenant. Any thread may call any method.

    AdapterStore's methods say what each promises and raises. Every one may raise StoreError besides.
    """

    @property
    def directories(self) -> Collection[Path]:
        """The local directories with adapters' files, of all tenants: nobody's to read but by name."""
        ...

    @property
    def url(self) -> str | None:
        """Where a shared store is; None where there is none."""
        ...

    @property
    def checked_at_start(self) -> bool:
        """Whether all files are here, to be read at start; else each adapter is checked when it is first used."""
        ...

    def staging(self) -> AbstractContextManager[Path]: ...

    def publish(
        self, tenant: str, name: str, staged: Path, info: Mapping[str, Any], *, replace: bool = False
    ) -> AdapterRecord: ...

    def get(self, tenant: str, name: str) -> AdapterRecord: ...

    def visible(self, tenant: str, name: str) -> AdapterRecord: ...

    def version(self, tenant: str, name: str, digest_prefix: str | None = None) -> AdapterVersion: ...

    def list(self, tenant: str, *, limit: int = 100, after: str | None = None) -> Page: ...

    def names(self, tenant: str) -> Sequence[tuple[str, float]]: ...

    def count(self, tenant: str) -> int: ...

    def delete(self, tenant: str, name: str) -> AdapterRecord: ...

    def rollback(self, tenant: str, name: str, digest_prefix: str) -> AdapterRecord: ...

    def activate(self, tenant: str, name: str, mode: str) -> Activation: ...

    def reactivate(self, activation: Activation) -> None: ...

    def deactivate(self, tenant: str, name: str) -> bool: ...

    def active(self, tenant: str) -> Activation | None: ...

    def all_versions(self) -> Iterator[tuple[str, str, AdapterVersion]]: ...

    def path(self, digest: str) -> Path:
        """Where the files of that digest are on this machine, if they are here. Raises InvalidSelection."""
        ...

    def fetch(self, digest: str) -> Path:
        """The local directory of a version's files, brought here if need be: not for an event loop.

        It may be gone again later, as a deleted adapter's is; `reading` keeps it. Raises InvalidSelection and, where
        files are brought, AdapterNotFound for those of no version and AdapterUnavailable for missing or damaged ones.
        """
        ...

    def reading(self, digest: str) -> AbstractContextManager[Path]:
        """Like `fetch`, of a directory that is not cleared away to make room while the block runs."""
        ...

    def infos(self, digest: str) -> Sequence[Mapping[str, Any]]:
        """What the publishers of the versions with that digest wrote about them."""
        ...

    def digest_in_use(self, digest: str) -> bool: ...

    def health(self) -> StoreHealth | None:
        """How it stands with what others change; None where nobody else does."""
        ...

    def close(self) -> None: ...

    def __hash__(self) -> int: ...  # of the object: what was read of a store is remembered by it
