"""What the store answers with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from adapters.errors import AdapterNotFound, InvalidSelection
from adapters.store.names import check_digest_prefix

SHARED = ""
"""The tenant whose adapters every tenant reads."""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One set of files under a name. `info` is what the publisher wrote about them."""

    digest: str
    created_at: float
    file_bytes: int
    info: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name, its current version spelled out, and every version kept, newest first (the current one included)."""

    tenant: str
    name: str
    digest: str
    created_at: float
    updated_at: float
    file_bytes: int
    info: Mapping[str, Any]
    versions: tuple[AdapterVersion, ...]

    def version(self, digest_prefix: str) -> AdapterVersion:
        """The one version whose digest starts with `digest_prefix`.

        Raises InvalidSelection for a malformed or ambiguous prefix, AdapterNotFound when no version matches.
        """
        prefix = check_digest_prefix(digest_prefix)
        matches = [version for version in self.versions if version.digest.startswith(prefix)]
        if not matches:
            raise AdapterNotFound(
                f"adapter {self.name!r} has no version {prefix} (any more): it has "
                + ", ".join(version.digest for version in self.versions),
                subject=self.name,
            )
        if len(matches) > 1:
            raise InvalidSelection(
                f"{prefix} matches {len(matches)} versions of adapter {self.name!r}: write more digits",
                subject=self.name,
            )
        return matches[0]


@dataclass(frozen=True, slots=True)
class Activation:
    """A tenant's default for requests that name no adapter; `mode` is "switch" or "merge".

    The adapter is the `owner`'s: the tenant itself, or the shared one.
    """

    tenant: str
    name: str
    mode: str
    owner: str


Page: TypeAlias = tuple[list[AdapterRecord], str | None]
"""Adapters by name, and the name to continue after (None: that was all)."""
