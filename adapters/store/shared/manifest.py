"""A tenant's manifest: its names, their versions, its activation. One JSON object, read and replaced whole.

    {"schema": 1, "tenant": "acme", "generation": 12, "write": "5f…", "recent": ["5f…", "a0…"],
     "values": {"8c…": {…}},
     "adapters": {"sql": {"id": "a0…", "created_at": 1.5, "updated_at": 2.5, "current": "sha256:…",
                          "versions": [{"digest": "sha256:…", "created_at": 2.5, "file_bytes": 9,
                                        "info": {"config": "8c…"}}]}},
     "active": {"owner": "", "name": "style", "mode": "switch", "id": "77…"}}

`generation` counts the writes and `write` names this one: no two contents are alike, whatever an etag is made of.
`recent` names the last writes, so that a writer who got no answer finds out. An adapter's `id` is of its own: a name
that was deleted and given again is another adapter, and is not the default because that one was. What versions' infos
have in common (`values`, by digest) is written once, as a family's adapters have nearly all of it in common.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from adapters.errors import StoreCorrupt
from adapters.store.names import is_digest, is_name
from adapters.store.outcomes import MODES
from adapters.store.records import Activation, AdapterRecord, AdapterVersion
from adapters.store.shared.keys import manifest_key

SCHEMA = 1
RECENT_WRITES = 200
_KEY_DIGITS = 32
_MOST_VALUES = 10_000

_values: dict[str, Any] = {}


@dataclass(frozen=True)
class Entry:
    """An adapter, and the id that tells it from others of its name."""

    id: str
    record: AdapterRecord


@dataclass(frozen=True)
class Active:
    """The tenant's default, while its owner has an adapter of that name and id."""

    activation: Activation
    id: str


@dataclass(frozen=True)
class Manifest:
    """What a tenant has. Never changed: a change makes another."""

    tenant: str
    generation: int = 0
    write: str = ""
    recent: tuple[str, ...] = ()
    adapters: Mapping[str, Entry] = field(default_factory=dict)
    active: Active | None = None

    @cached_property
    def names(self) -> Sequence[str]:
        """In order."""
        return sorted(self.adapters)

    @cached_property
    def by_digest(self) -> Mapping[str, Sequence[AdapterVersion]]:
        """The versions of each digest, oldest first."""
        found: dict[str, list[AdapterVersion]] = {}
        for version in sorted(self.versions(), key=lambda version: version.created_at):
            found.setdefault(version.digest, []).append(version)
        return found

    def versions(self) -> Sequence[AdapterVersion]:
        return [version for entry in self.adapters.values() for version in entry.record.versions]

    def stamped(self, write: str) -> Manifest:
        """The same as the next generation, by that write."""
        recent = (write, *self.recent)[:RECENT_WRITES]
        return replace(self, generation=self.generation + 1, write=write, recent=recent)


def encode(manifest: Manifest) -> bytes:
    values: dict[str, Any] = {}
    known: dict[int, str] = {}  # infos of one family have the same objects: each is looked at once

    def reference(value: Any) -> str:
        if id(value) not in known:
            key = known[id(value)] = _key_of(value)
            values[key] = value
        return known[id(value)]

    adapters = {name: _entry_json(manifest.adapters[name], reference) for name in manifest.names}
    active = manifest.active
    content = {
        "schema": SCHEMA,
        "tenant": manifest.tenant,
        "generation": manifest.generation,
        "write": manifest.write,
        "recent": manifest.recent,
        "values": values,
        "adapters": adapters,
        "active": None if active is None else _active_json(active),
    }
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def decode(data: bytes, tenant: str) -> Manifest:
    """The manifest of that tenant. Raises StoreCorrupt: for another one's, too, and for one of a newer release."""
    try:
        content = json.loads(data, parse_constant=_no_number)
        if isinstance(content, dict) and isinstance(content.get("schema"), int) and content["schema"] > SCHEMA:
            raise StoreCorrupt(
                f"{_shown(tenant)} was written by a newer release (schema {content['schema']}, this one knows "
                f"{SCHEMA}): run that one"
            )
        return _manifest(content, tenant)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StoreCorrupt(
            f"{_shown(tenant)} is damaged ({type(error).__name__}: {error}): put an earlier version of that object back"
        ) from error


def _manifest(content: Any, tenant: str) -> Manifest:
    if content["schema"] != SCHEMA:
        raise ValueError(f"the schema is {content['schema']!r}")
    if content["tenant"] != tenant:
        raise ValueError(f"it is the manifest of tenant {content['tenant']!r}")
    values = {key: _kept(key, value) for key, value in content["values"].items()}
    adapters = {name: _entry(tenant, name, entry, values) for name, entry in content["adapters"].items()}
    active = content["active"]
    return Manifest(
        tenant,
        _generation(content["generation"]),
        str(content["write"]),
        tuple(map(str, content["recent"])),
        adapters,
        None if active is None else _active(tenant, active),
    )


def _key_of(value: Any) -> str:
    text = json.dumps(value, allow_nan=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]


def _kept(key: str, value: Any) -> Any:
    """The one copy of a value, however often manifests are read again: those of a family are many and large."""
    if _key_of(value) != key:
        raise ValueError(f"the value {key[:80]!r} is not what its key says")
    if len(_values) >= _MOST_VALUES:
        _values.clear()
    return _values.setdefault(key, value)


def _entry_json(entry: Entry, reference: Any) -> dict[str, Any]:
    record = entry.record
    versions = [
        {
            "digest": version.digest,
            "created_at": version.created_at,
            "file_bytes": version.file_bytes,
            "info": {key: reference(value) for key, value in version.info.items()},
        }
        for version in record.versions
    ]
    return {
        "id": entry.id,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "current": record.digest,
        "versions": versions,
    }


def _entry(tenant: str, name: str, content: Any, values: Mapping[str, Any]) -> Entry:
    versions = tuple(_version(version, values) for version in content["versions"])
    current = next((version for version in versions if version.digest == content["current"]), None)
    if not is_name(name) or current is None:
        raise ValueError(f"adapter {name[:140]!r} has no current version, or no such name is possible")
    if len({version.digest for version in versions}) < len(versions):
        raise ValueError(f"adapter {name!r} has a version twice")
    record = AdapterRecord(
        tenant,
        name,
        current.digest,
        _time(content["created_at"]),
        _time(content["updated_at"]),
        current.file_bytes,
        current.info,
        versions,
    )
    return Entry(str(content["id"]), record)


def _version(content: Any, values: Mapping[str, Any]) -> AdapterVersion:
    if not is_digest(content["digest"]):
        raise ValueError(f"{content['digest'][:80]!r} is no digest")
    info = {key: values[reference] for key, reference in content["info"].items()}
    return AdapterVersion(content["digest"], _time(content["created_at"]), int(content["file_bytes"]), info)


def _active_json(active: Active) -> dict[str, str]:
    activation = active.activation
    return {"owner": activation.owner, "name": activation.name, "mode": activation.mode, "id": active.id}


def _active(tenant: str, content: Any) -> Active:
    if content["mode"] not in MODES:
        raise ValueError(f"the default's mode is {str(content['mode'])[:80]!r}")
    activation = Activation(tenant, str(content["name"]), str(content["mode"]), str(content["owner"]))
    return Active(activation, str(content["id"]))


def _generation(value: Any) -> int:
    if int(value) < 0:
        raise ValueError(f"the generation is {value!r}")
    return int(value)


def _time(value: Any) -> float:
    if not math.isfinite(float(value)):
        raise ValueError(f"{value!r} is no time")
    return float(value)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON's")


def _shown(tenant: str) -> str:
    whose = f"manifest of tenant {tenant!r}" if tenant else "shared manifest"
    return f"the shared store's {whose} ({manifest_key(tenant)})"
