"""The store's SQL. Every method is a step of a transaction that the caller has open."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from adapters.store.database import UnreadableRow
from adapters.store.records import Activation, AdapterRecord, AdapterVersion, Page

_ADAPTER = "tenant, name, digest, created_at, updated_at"
_VERSION = "digest, created_at, file_bytes, info"

# The shared adapters that a tenant sees under their names: those that it has none of its own for.
_SHARED_WITH = (
    "tenant = '' AND :tenant != ''"
    " AND NOT EXISTS (SELECT 1 FROM adapters own WHERE own.tenant = :tenant AND own.name = a.name)"
)


class Catalog:
    """Names, versions and activations, as rows."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._sql = connection

    def find(self, tenant: str, name: str) -> AdapterRecord | None:
        row = self._sql.execute(
            "SELECT name, digest, created_at, updated_at FROM adapters WHERE tenant = ? AND name = ?",
            (tenant, name),
        ).fetchone()
        if row is None:
            return None
        return _record(tenant, row, self._versions(tenant, name, name))

    def page(self, tenant: str, limit: int, after: str) -> Page:
        """Of the tenant's adapters, and of the shared ones whose names it has not used itself."""
        rows = self._sql.execute(
            f"SELECT * FROM (SELECT {_ADAPTER} FROM adapters a WHERE tenant = :tenant AND name > :after"
            "  ORDER BY name LIMIT :most)"
            f" UNION ALL SELECT * FROM (SELECT {_ADAPTER} FROM adapters a WHERE {_SHARED_WITH} AND name > :after"
            "  ORDER BY name LIMIT :most)"
            " ORDER BY name LIMIT :most",
            {"tenant": tenant, "after": after, "most": limit + 1},
        ).fetchall()
        shown = rows[:limit]
        if not shown:
            return [], None
        owners = {row[0] for row in shown}
        versions = {owner: self._versions(owner, shown[0][1], shown[-1][1]) for owner in owners}
        records = [_record(owner, row, versions[owner]) for owner, *row in shown]
        return records, records[-1].name if len(rows) > limit else None

    def names(self, tenant: str) -> list[tuple[str, float]]:
        """(name, created_at) of the same, in order of name."""
        return self._sql.execute(
            f"SELECT name, created_at FROM adapters a WHERE tenant = :tenant OR {_SHARED_WITH} ORDER BY name",
            {"tenant": tenant},
        ).fetchall()

    def count(self, tenant: str) -> int:
        (count,) = self._sql.execute("SELECT count(*) FROM adapters WHERE tenant = ?", (tenant,)).fetchone()
        return int(count)

    def put(self, tenant: str, name: str, version: AdapterVersion) -> None:
        """Make a version, new or known, the newest and the current one."""
        digest, now = version.digest, version.created_at
        self._sql.execute(
            "INSERT INTO adapters (tenant, name, digest, created_at, updated_at) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (tenant, name) DO UPDATE SET digest = excluded.digest, updated_at = excluded.updated_at",
            (tenant, name, digest, now, now),
        )
        self._sql.execute("DELETE FROM versions WHERE tenant = ? AND name = ? AND digest = ?", (tenant, name, digest))
        self._sql.execute(
            f"INSERT INTO versions (tenant, name, {_VERSION}) VALUES (?, ?, ?, ?, ?, ?)",
            (tenant, name, digest, now, version.file_bytes, json.dumps(dict(version.info), allow_nan=False)),
        )

    def make_current(self, tenant: str, name: str, digest: str, now: float) -> None:
        self._sql.execute(
            "UPDATE adapters SET digest = ?, updated_at = ? WHERE tenant = ? AND name = ?",
            (digest, now, tenant, name),
        )

    def prune(self, tenant: str, name: str, keep: int) -> list[str]:
        """Forget all but the current version and the newest `keep - 1` others; the digests forgotten."""
        rows = self._sql.execute(
            "SELECT v.digest FROM versions v JOIN adapters a USING (tenant, name)"
            " WHERE tenant = ? AND name = ? AND v.digest != a.digest ORDER BY v.seq DESC LIMIT -1 OFFSET ?",
            (tenant, name, keep - 1),
        ).fetchall()
        pruned = [digest for (digest,) in rows]
        self._sql.executemany(
            "DELETE FROM versions WHERE tenant = ? AND name = ? AND digest = ?",
            [(tenant, name, digest) for digest in pruned],
        )
        return pruned

    def delete(self, tenant: str, name: str) -> None:
        """Forget an adapter and, by the schema's cascades, its versions and whoever's default it is."""
        self._sql.execute("DELETE FROM adapters WHERE tenant = ? AND name = ?", (tenant, name))

    def activate(self, activation: Activation) -> None:
        self._sql.execute(
            "INSERT INTO activations (tenant, owner, name, mode) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (tenant) DO UPDATE SET owner = excluded.owner, name = excluded.name, mode = excluded.mode",
            (activation.tenant, activation.owner, activation.name, activation.mode),
        )

    def deactivate(self, tenant: str, name: str) -> bool:
        cursor = self._sql.execute("DELETE FROM activations WHERE tenant = ? AND name = ?", (tenant, name))
        return cursor.rowcount > 0

    def active(self, tenant: str) -> Activation | None:
        row = self._sql.execute(
            "SELECT tenant, name, mode, owner FROM activations WHERE tenant = ?", (tenant,)
        ).fetchone()
        return None if row is None else Activation(*row)

    def refers_to(self, digest: str) -> bool:
        row = self._sql.execute("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", (digest,)).fetchone()
        return row is not None

    def infos(self, digest: str) -> list[dict[str, Any]]:
        rows = self._sql.execute(f"SELECT {_VERSION} FROM versions WHERE digest = ? ORDER BY seq", (digest,))
        return [dict(_version(row).info) for row in rows]

    def digests(self) -> set[str]:
        return {digest for (digest,) in self._sql.execute("SELECT DISTINCT digest FROM versions")}

    def versions_after(self, seq: int, limit: int) -> list[tuple[int, str, str, AdapterVersion]]:
        """The oldest `limit` versions newer than `seq`: (seq, tenant, name, version)."""
        rows = self._sql.execute(
            f"SELECT seq, tenant, name, {_VERSION} FROM versions WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit)
        )
        return [(row[0], row[1], row[2], _version(row[3:])) for row in rows]

    def _versions(self, tenant: str, first: str, last: str) -> dict[str, tuple[AdapterVersion, ...]]:
        """The versions, newest first, of every adapter from `first` to `last`."""
        rows: Iterable[tuple[Any, ...]] = self._sql.execute(
            f"SELECT name, {_VERSION} FROM versions WHERE tenant = ? AND name BETWEEN ? AND ? ORDER BY name, seq DESC",
            (tenant, first, last),
        )
        return {
            name: tuple(_version(row[1:]) for row in group) for name, group in groupby(rows, key=lambda row: row[0])
        }


def _version(row: tuple[Any, ...]) -> AdapterVersion:
    digest, created_at, file_bytes, info = row
    try:
        return AdapterVersion(digest, created_at, file_bytes, json.loads(info))
    except (TypeError, ValueError) as error:
        raise UnreadableRow(f"the row of version {digest} cannot be read") from error


def _record(tenant: str, row: Sequence[Any], by_name: Mapping[str, tuple[AdapterVersion, ...]]) -> AdapterRecord:
    name, digest, created_at, updated_at = row
    versions = by_name.get(name, ())
    current = next((version for version in versions if version.digest == digest), None)
    if current is None:
        raise UnreadableRow(f"adapter {name!r} has no version {digest}, which is its current one")
    return AdapterRecord(tenant, name, digest, created_at, updated_at, current.file_bytes, current.info, versions)
