"""What can be done to a manifest. Each is a function of the latest one, so that it can be done again to a later one.

All answer (the manifest afterwards, what the caller gets); the very manifest that they were given if nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from adapters.errors import AdapterNotFound
from adapters.store.names import is_name
from adapters.store.outcomes import exists, not_found
from adapters.store.records import Activation, AdapterRecord, AdapterVersion
from adapters.store.shared.manifest import Active, Entry, Manifest

T = TypeVar("T")
Changed = tuple[Manifest, T]


def find(manifest: Manifest, name: str) -> Entry:
    """Raises AdapterNotFound."""
    entry = manifest.adapters.get(name)
    if entry is None:
        raise not_found(name)
    return entry


def published(
    manifest: Manifest, name: str, version: AdapterVersion, id: str, *, replacing: bool, keep: int
) -> Changed[AdapterRecord]:
    """The version as the newest and the current one; the oldest ones beyond `keep` are forgotten.

    Raises AdapterExists.
    """
    entry = manifest.adapters.get(name)
    if entry is None:
        record = _record(manifest.tenant, name, version.created_at, version.created_at, version.digest, (version,))
        return _with(manifest, Entry(id, record)), record
    if not replacing:
        raise exists(entry.record, version.digest)
    if entry.record.digest == version.digest:
        return manifest, entry.record
    others = [each for each in entry.record.versions if each.digest != version.digest]
    versions = (version, *others[: keep - 1])
    record = _record(manifest.tenant, name, entry.record.created_at, version.created_at, version.digest, versions)
    return _with(manifest, Entry(entry.id, record)), record


def deleted(manifest: Manifest, name: str) -> Changed[AdapterRecord]:
    """Without the adapter, and without a default that it was. Raises AdapterNotFound."""
    entry = find(manifest, name)
    adapters = {each: other for each, other in manifest.adapters.items() if each != name}
    active = manifest.active
    if active is not None and active.id == entry.id:
        active = None
    return replace(manifest, adapters=adapters, active=active), entry.record


def made_current(manifest: Manifest, name: str, digest: str, now: float) -> Changed[AdapterRecord]:
    """The version of that digest current. Raises AdapterNotFound."""
    entry = find(manifest, name)
    digest = entry.record.version(digest).digest
    if digest == entry.record.digest:
        return manifest, entry.record
    record = _record(manifest.tenant, name, entry.record.created_at, now, digest, entry.record.versions)
    return _with(manifest, Entry(entry.id, record)), record


def activated(manifest: Manifest, name: str, mode: str, shared: Manifest) -> Changed[Activation]:
    """The tenant's adapter of that name, else the shared one, as its default. Raises AdapterNotFound."""
    own = manifest.adapters.get(name) if is_name(name) else None
    owner, entry = (manifest.tenant, own) if own is not None else (shared.tenant, find(shared, name))
    return _activated(manifest, Activation(manifest.tenant, name, mode, owner), entry)


def reactivated(manifest: Manifest, activation: Activation, shared: Manifest) -> Changed[None]:
    """That very adapter as the default, or none if it is gone."""
    owner = manifest if activation.owner == manifest.tenant else shared
    try:
        changed, _ = _activated(manifest, activation, find(owner, activation.name))
    except AdapterNotFound:
        changed = manifest if manifest.active is None else replace(manifest, active=None)
    return changed, None


def deactivated(manifest: Manifest, name: str) -> Changed[bool]:
    """Without a default, if the adapter of that name is it."""
    if manifest.active is None or manifest.active.activation.name != name:
        return manifest, False
    return replace(manifest, active=None), True


def _activated(manifest: Manifest, activation: Activation, entry: Entry) -> Changed[Activation]:
    active = Active(activation, entry.id)
    return (manifest if manifest.active == active else replace(manifest, active=active)), activation


def _with(manifest: Manifest, entry: Entry) -> Manifest:
    return replace(manifest, adapters={**manifest.adapters, entry.record.name: entry})


def _record(
    tenant: str, name: str, created_at: float, updated_at: float, digest: str, versions: Sequence[AdapterVersion]
) -> AdapterRecord:
    current = next(version for version in versions if version.digest == digest)
    return AdapterRecord(
        tenant, name, digest, created_at, updated_at, current.file_bytes, current.info, tuple(versions)
    )
