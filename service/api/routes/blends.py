"""POST /v1/blends: a weighted sum of adapters, stored as one compact adapter that PEFT loads."""

from __future__ import annotations

import json
from functools import partial

from anyio import to_thread
from fastapi import APIRouter

from adapters.export import write_files
from adapters.store import AdapterRecord, check_name
from service.api.adapter_files import CHAT_TEMPLATE_FILE, LABELS_FILE
from service.api.catalog import show
from service.api.chat import template_of
from service.api.deps import ServerState, State, Tenant
from service.api.labels import classes_of
from service.api.registration import register
from service.api.schemas.adapters import AdapterView
from service.api.schemas.blends import BlendRequest
from service.api.schemas.common import error_responses
from service.api.selection import resolve
from service.engine.selection import SelectionSpec, WeightedName
from service.engine.task import Task

router = APIRouter(tags=["adapters"])


@router.post("/v1/blends", status_code=201, responses=error_responses(400, 401, 403, 404, 409, 422, 503, 507))
async def blend_adapters(body: BlendRequest, state: State, tenant: Tenant) -> AdapterView:
    """Makes one adapter of several: its deltas are the weighted sum of theirs, as they are now."""
    check_name(body.name, state.settings.base_names)
    record = await to_thread.run_sync(partial(_blend, state, tenant, body), limiter=state.registering)
    return await to_thread.run_sync(show, state, tenant, record)


def _blend(state: ServerState, tenant: str, body: BlendRequest) -> AdapterRecord:
    names = [WeightedName(part.name, part.weight) for part in body.adapters]
    selection = resolve(state, tenant, SelectionSpec.of(None, names))
    classes = classes_of(state, selection) if state.task is Task.CLASSIFY else None
    blended = state.registry.blend(selection.key)
    parts = [{"name": part.name, "digest": part.digest, "weight": part.weight} for part in selection.adapters]
    template = template_of(state, selection)
    with state.store.staging() as staged:
        write_files(blended, staged, {"blend": json.dumps(parts)})
        if template is not None:
            (staged / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
        if classes is not None:
            (staged / LABELS_FILE).write_text(json.dumps(classes.names), encoding="utf-8")
        return register(state.registry, tenant, body.name, staged, replace=body.replace, provenance={"blend": parts})
