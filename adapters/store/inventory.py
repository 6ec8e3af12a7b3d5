"""What is in a data directory, row by row and file by file, and what of it does not fit together. Changes nothing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from adapters.store.blobs import BlobDirectory
from adapters.store.names import is_digest, is_name

Name = tuple[str, str]
"""A tenant and a name of its own."""


class Problem(StrEnum):
    DATABASE = "database"  # it is damaged, lost, or not ours
    MANIFEST = "manifest"  # of a tenant, in a shared store: it cannot be read
    ROW = "row"  # a version's row cannot be read
    MISSING = "missing_files"
    DAMAGED = "damaged_files"
    CURRENT = "current_version"  # a name has versions, and none of those is its current one
    ACTIVATION = "activation"  # of an adapter that does not exist
    UNREFERENCED = "unreferenced_files"
    LEFTOVER = "leftover"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `subject` is a name, a digest or a path."""

    problem: Problem
    subject: str
    message: str


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A row of `versions`. One that is not `readable` has a name, a digest or an `info` that cannot be."""

    seq: int
    owner: Name
    digest: str
    created_at: float
    readable: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    """`current` is each name's current digest, `intact` says of each digest with files whether they are what it says.

    `versions` are newest first. `orphans` are the banks that no files link to.
    """

    versions: tuple[VersionRow, ...]
    current: Mapping[Name, str]
    active: tuple[Name, ...]
    intact: Mapping[str, bool]
    leftovers: tuple[Path, ...]
    orphans: tuple[Path, ...] = ()

    @property
    def has_rows(self) -> bool:
        return bool(self.versions or self.current or self.active)

    @property
    def named(self) -> frozenset[str]:
        """The digests that a row names."""
        return frozenset(row.digest for row in self.versions)

    @property
    def unreferenced(self) -> list[str]:
        return sorted(self.intact.keys() - self.named)

    @property
    def names(self) -> list[Name]:
        """Every tenant and name that has a row anywhere but among the activations."""
        return sorted(self.current.keys() | {row.owner for row in self.versions})

    def is_sound(self, row: VersionRow) -> bool:
        """Whether the version can be read and its files are intact."""
        return row.readable and self.intact.get(row.digest, False)

    def sound_versions(self, owner: Name) -> list[VersionRow]:
        """Newest first."""
        return [row for row in self.versions if row.owner == owner and self.is_sound(row)]


def take_inventory(connection: sqlite3.Connection, blobs: BlobDirectory) -> Inventory:
    """Reads every row, and every file that is stored. Raises sqlite3.Error, OSError."""
    connection.text_factory = _any_text
    rows = connection.execute("SELECT seq, tenant, name, digest, created_at, info FROM versions ORDER BY seq DESC")
    return Inventory(
        versions=tuple(map(_version, rows)),
        current={(row[0], row[1]): row[2] for row in connection.execute("SELECT tenant, name, digest FROM adapters")},
        active=tuple(connection.execute("SELECT owner, name FROM activations ORDER BY tenant")),
        intact={digest: blobs.is_intact(digest) for digest in sorted(blobs.digests())},
        leftovers=tuple(blobs.leftovers()),
        orphans=tuple(blobs.banks.orphans()),
    )


def findings_of(inventory: Inventory) -> Iterator[Finding]:
    """Everything that is wrong, names first."""
    for row in inventory.versions:
        name = _shown(row.owner)
        if not row.readable:
            yield Finding(Problem.ROW, name, f"the row of its version {row.digest[:80]!r} cannot be read")
        elif row.digest not in inventory.intact:
            yield Finding(Problem.MISSING, name, f"the files of its version {row.digest} are gone")
        elif not inventory.intact[row.digest]:
            yield Finding(Problem.DAMAGED, name, f"the files of its version {row.digest} are not what was uploaded")
    for owner in inventory.names:
        has = {row.digest for row in inventory.versions if row.owner == owner}
        if inventory.current.get(owner) not in has:
            yield Finding(Problem.CURRENT, _shown(owner), f"its current version is none of its {len(has)} versions")
    for owner in inventory.active:
        if owner not in inventory.current:
            yield Finding(Problem.ACTIVATION, _shown(owner), "it is active, and does not exist")
    for digest in inventory.unreferenced:
        yield Finding(Problem.UNREFERENCED, digest, "no adapter has these files")
    for path in inventory.leftovers:
        yield Finding(Problem.LEFTOVER, f"tmp/{path.name}", "a process that ended early left it")
    for bank in inventory.orphans:
        yield Finding(Problem.LEFTOVER, f"banks/sha256/{bank.name}", "no adapter has this vector bank")


def _version(row: tuple[Any, ...]) -> VersionRow:
    seq, tenant, name, digest, created_at, info = row
    readable = is_name(str(name)) and is_digest(str(digest)) and isinstance(created_at, float) and _is_object(info)
    return VersionRow(seq, (tenant, name), str(digest), created_at, readable)


def _is_object(info: object) -> bool:
    try:
        return isinstance(json.loads(str(info)), dict)
    except ValueError:
        return False


def _shown(owner: Name) -> str:
    tenant, name = owner
    return f"{tenant}/{name}" if tenant else str(name)


def _any_text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")
