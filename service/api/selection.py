"""From the names that a client gives to the digests that the engine runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from adapters.errors import AdapterNotFound, AdapterUnavailable, InvalidSelection, MergeUnsupported
from adapters.status import AdapterState
from adapters.store import SHARED, AdapterRecord
from service.api.deps import ServerState
from service.engine.selection import Mode, SelectedAdapter, Selection, SelectionSpec, WeightedName


def resolve(state: ServerState, tenant: str, spec: SelectionSpec) -> Selection:
    """The selection that a request asks for, or the tenant's active adapter, or the base model.

    Reads the store, and waits for the network where unknown names are looked up: not for the event loop. Raises
    AdapterNotFound (never the base model instead), AdapterUnavailable, InvalidSelection, MergeUnsupported, or what the
    resolver raises for a name that is looked up.
    """
    if spec.mode is Mode.MERGE:
        check_mergeable(state)
    if spec.names is None:
        return _active(state, tenant, spec.mode)
    mode = spec.mode or Mode.SWITCH
    if len(spec.names) == 1 and state.settings.means_base(spec.names[0].name):
        return Selection((), mode)
    return Selection(_merged([_find(state, tenant, name) for name in spec.names]), mode)


def check_mergeable(state: ServerState) -> None:
    """Whether selections can be folded into the base at all. Raises MergeUnsupported."""
    if (reason := state.base.unfoldable) is not None:
        raise MergeUnsupported(
            f"{reason}: nothing can be folded into its weights; use "
            "mode 'switch', which serves one adapter and blends alike",
            subject="mode",
        )


def _active(state: ServerState, tenant: str, mode: Mode | None) -> Selection:
    active = state.store.active(tenant)
    if active is None:
        return Selection((), mode or Mode.SWITCH)
    try:
        record = state.store.get(active.owner, active.name)
    except AdapterNotFound:
        if state.store.active(tenant) == active:
            raise
        return _active(state, tenant, mode)  # it was deleted, and thereby deactivated, between the two reads
    if mode is None:  # an activation with merge may be older than that
        mode = Mode.SWITCH if state.base.unfoldable else Mode(active.mode)
    return Selection((_servable(state, record, record.digest),), mode)


def _find(state: ServerState, tenant: str, wanted: WeightedName) -> SelectedAdapter:
    name, digest_prefix = wanted.split()
    if state.settings.means_base(name):
        raise InvalidSelection(
            f"{name!r} is the base model, which has no delta to blend and no versions; leave it out", subject="adapters"
        )
    record = _record(state, tenant, name)
    return _servable(state, record, digest_prefix or record.digest, wanted.weight)


def _servable(state: ServerState, record: AdapterRecord, digest_prefix: str, weight: float = 1.0) -> SelectedAdapter:
    name, version = record.name, record.version(digest_prefix)
    status = state.registry.status(version.digest)
    if status.state is AdapterState.FAILED:
        raise AdapterUnavailable(
            f"adapter {name!r} ({version.digest}) cannot be served: {status.reason}; upload it again or roll back",
            subject=name,
        )
    return SelectedAdapter(name, version.digest, weight, record.tenant)


def _record(state: ServerState, tenant: str, name: str) -> AdapterRecord:
    """The adapter that the tenant sees under that name. An unknown one is looked up, if the server looks them up."""
    try:
        return state.store.visible(tenant, name)
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
        by_digest[adapter.digest] = replace(known or adapter, weight=weight)
    return tuple(by_digest.values())
