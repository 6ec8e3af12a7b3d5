"""From the names that a client gives to the digests that the engine runs."""

from __future__ import annotations

import math
from collections.abc import Iterable

from adapters.errors import AdapterNotFound, AdapterUnavailable, InvalidSelection
from adapters.registry import AdapterState
from adapters.store import AdapterRecord
from service.api.deps import ServerState
from service.api.registration import SHARED
from service.engine.selection import Mode, SelectedAdapter, Selection, SelectionSpec, WeightedName


def resolve(state: ServerState, tenant: str, spec: SelectionSpec) -> Selection:
    """The selection that a request asks for, or the tenant's active adapter, or the base model.

    Reads the store, and waits for the network where unknown names are looked up: not for the event loop. Raises
    AdapterNotFound (never the base model instead), AdapterUnavailable, InvalidSelection, or what the resolver raises
    for a name that is looked up.
    """
    if spec.names is None:
        return _active(state, tenant, spec.mode)
    mode = spec.mode or Mode.SWITCH
    if len(spec.names) == 1 and state.settings.means_base(spec.names[0].name):
        return Selection((), mode)
    return Selection(_merged([_find(state, tenant, name) for name in spec.names]), mode)


def _active(state: ServerState, tenant: str, mode: Mode | None) -> Selection:
    active = state.store.active(tenant)
    if active is None:
        return Selection((), mode or Mode.SWITCH)
    try:
        adapter = _find(state, tenant, WeightedName(active.name))
    except AdapterNotFound:
        if state.store.active(tenant) == active:
            raise
        return _active(state, tenant, mode)  # it was deleted, and thereby deactivated, between the two reads
    return Selection((adapter,), mode or Mode(active.mode))


def _find(state: ServerState, tenant: str, wanted: WeightedName) -> SelectedAdapter:
    name, digest_prefix = wanted.split()
    if state.settings.means_base(name):
        raise InvalidSelection(
            f"{name!r} is the base model, which has no delta to blend and no versions; leave it out", subject="adapters"
        )
    record = _record(state, tenant, name)
    version = record.version(digest_prefix or record.digest)
    status = state.registry.status(version.digest)
    if status.state is AdapterState.FAILED:
        raise AdapterUnavailable(
            f"adapter {name!r} ({version.digest}) cannot be served: {status.reason}; upload it again or roll back",
            subject=name,
        )
    return SelectedAdapter(name, version.digest, wanted.weight)


def _record(state: ServerState, tenant: str, name: str) -> AdapterRecord:
    """The tenant's adapter of that name. One that nobody has yet is looked up, if the server looks adapters up."""
    try:
        return state.store.get(tenant, name)
    except AdapterNotFound:
        if state.resolver is None:
            raise
    state.resolver.resolve(name)
    return state.store.get(SHARED, name)


def _merged(adapters: Iterable[SelectedAdapter]) -> tuple[SelectedAdapter, ...]:
    """The same files named twice, whatever they are called, are one term of the sum."""
    by_digest: dict[str, SelectedAdapter] = {}
    for adapter in adapters:
        known = by_digest.get(adapter.digest)
        weight = adapter.weight + (known.weight if known else 0.0)
        if not math.isfinite(weight):
            raise InvalidSelection(f"the weights of {adapter.name!r} add up to no finite number", subject="adapters")
        by_digest[adapter.digest] = SelectedAdapter((known or adapter).name, adapter.digest, weight)
    return tuple(by_digest.values())
