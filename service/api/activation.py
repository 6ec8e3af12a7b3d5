"""Makes an adapter the default, and for a merge has it folded in."""

from __future__ import annotations

import asyncio

from anyio import to_thread

from adapters.merge import FoldReport
from adapters.store import Activation
from service.api.catalog import show
from service.api.deps import ServerState
from service.api.schemas.adapters import AdapterView, MergedView
from service.api.selection import resolve
from service.engine.selection import Mode, Selection, SelectionSpec, WeightedName

# Folding waits for a batch that runs this selection alone. The activation holds whether or not that has come.
FOLD_WAIT_S = 10.0


async def activate(state: ServerState, tenant: str, name: str, mode: Mode) -> AdapterView:
    """The adapter once it is active: a MergedView after `merge`.

    Raises AdapterNotFound, AdapterUnavailable, or what a refused fold raises; the adapter active before is then so
    again.
    """
    selection, before = await to_thread.run_sync(_activate, state, tenant, name, mode)
    if mode is Mode.SWITCH:
        return await to_thread.run_sync(_show, state, tenant, name)
    try:
        report = await _fold(state, selection)
    except Exception:
        await to_thread.run_sync(_restore, state, tenant, name, before)
        raise
    view = await to_thread.run_sync(_show, state, tenant, name)
    error, layer = (None, None) if report is None else (report.merge_error, report.layer)
    return MergedView(**view.model_dump(), merge_error=error, merge_error_layer=layer)


def _activate(state: ServerState, tenant: str, name: str, mode: Mode) -> tuple[Selection, Activation | None]:
    """The adapter's selection, and what was active before."""
    state.store.visible(tenant, name)  # a name, not the base and not a pinned version
    selection = resolve(state, tenant, SelectionSpec((WeightedName(name),), mode))
    before = state.store.active(tenant)
    state.store.activate(tenant, name, mode)
    return selection, before


def _restore(state: ServerState, tenant: str, name: str, before: Activation | None) -> None:
    """An activation that was answered with an error has not happened."""
    if before is None:
        state.store.deactivate(tenant, name)
    else:
        state.store.reactivate(before)


def _show(state: ServerState, tenant: str, name: str) -> AdapterView:
    return show(state, tenant, state.store.visible(tenant, name))


async def _fold(state: ServerState, selection: Selection) -> FoldReport | None:
    """The fold's report, None if it had to wait too long: it will be folded later."""
    folding = asyncio.wrap_future(state.engine.fold(selection))
    done, _ = await asyncio.wait({folding}, timeout=FOLD_WAIT_S)  # never cancels: the future is the engine's
    return folding.result() if done else None
