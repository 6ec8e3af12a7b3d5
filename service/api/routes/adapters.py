"""Adapters: uploaded, listed, shown, deleted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from adapters.store import AdapterRecord, check_name
from service.api.activation import activate
from service.api.catalog import delete, show, show_detail, show_page
from service.api.deps import ServerState, State, Tenant
from service.api.errors import ApiError
from service.api.registration import register
from service.api.schemas.adapters import (
    AdapterDetail,
    AdapterPage,
    AdapterView,
    MergedView,
    PageQuery,
    SourceUpload,
    UploadQuery,
)
from service.api.schemas.common import error_responses
from service.api.selection import check_mergeable
from service.api.sources import fetch_source
from service.api.uploads import REQUIRED_PARTS, Upload, receive_form
from service.engine.selection import Mode

router = APIRouter(tags=["adapters"])

_FORM: dict[str, Any] = {
    "type": "object",
    "required": list(REQUIRED_PARTS),
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "description": "1 to 128 letters, digits, '.', '_' and '-'"},
        "config": {"type": "string", "format": "binary", "description": "adapter_config.json"},
        "weights": {"type": "string", "format": "binary", "description": "adapter_model.safetensors"},
        "tokenizer_config": {"type": "string", "format": "binary", "description": "tokenizer_config.json"},
        "chat_template": {"type": "string", "format": "binary", "description": "chat_template.jinja"},
        "labels": {
            "type": "string",
            "format": "binary",
            "description": "labels.json: a classifier's names of classes, as a list or as id2label",
        },
        "activate": {"type": "string", "enum": ["true", "switch", "merge", "false"]},
    },
}
_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _FORM},
            "application/json": {"schema": SourceUpload.model_json_schema()},
        },
    }
}


@router.post(
    "/v1/adapters",
    status_code=201,
    response_model=MergedView | AdapterView,
    responses=error_responses(400, 401, 403, 408, 409, 413, 415, 422, 503, 507),
    openapi_extra=_UPLOAD_BODY,
)
async def upload_adapter(
    request: Request, query: Annotated[UploadQuery, Query()], state: State, tenant: Tenant
) -> AdapterView:
    """Takes an adapter in: its files in a form, or from a directory of the server or the Hub.

    It is checked whole before it is listed.
    """
    with state.store.staging() as staged:
        upload = await _receive(request, staged, state)
        if upload.activate is Mode.MERGE:
            check_mergeable(state)
        registering = partial(_register, state, tenant, upload, staged, query)
        record = await to_thread.run_sync(registering, limiter=state.registering)
    if upload.activate is not None:
        return await activate(state, tenant, upload.name, upload.activate)
    return await to_thread.run_sync(show, state, tenant, record)


@router.get("/v1/adapters", responses=error_responses(400, 401))
def list_adapters(query: Annotated[PageQuery, Query()], state: State, tenant: Tenant) -> AdapterPage:
    """The adapters in order of their names, page by page."""
    return show_page(state, tenant, query.limit, query.after)


@router.get("/v1/adapters/{name}", responses=error_responses(401, 404))
def get_adapter(name: str, state: State, tenant: Tenant) -> AdapterDetail:
    """One adapter with its config and its versions."""
    return show_detail(state, tenant, name)


@router.delete("/v1/adapters/{name}", status_code=204, responses=error_responses(401, 403, 404, 503))
def delete_adapter(name: str, state: State, tenant: Tenant) -> None:
    """Forgets an adapter with all its versions. Running requests finish on the version they hold."""
    delete(state, tenant, name)


async def _receive(request: Request, staged: Path, state: ServerState) -> Upload:
    """Stages the files of either kind of body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await receive_form(request, staged, state.settings.base_names)
    if kind != "application/json":
        raise ApiError(
            "invalid_request",
            f"the Content-Type is {kind[:80]!r}: send multipart/form-data with name, config and weights, or "
            'application/json with {"name", "source"}',
        )
    body = _parse_source(await request.body())
    check_name(body.name, state.settings.base_names)
    source = await to_thread.run_sync(fetch_source, body.source, staged, state, limiter=state.fetching)
    return Upload(body.name, body.activation, source)


def _parse_source(body: bytes) -> SourceUpload:
    """FastAPI would do this, were the body always JSON."""
    try:
        return SourceUpload.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in error.errors()]) from error


def _register(state: ServerState, tenant: str, upload: Upload, staged: Path, query: UploadQuery) -> AdapterRecord:
    return register(
        state.registry,
        tenant,
        upload.name,
        staged,
        replace=query.replace,
        allow_base_mismatch=query.allow_base_mismatch,
        source=upload.source,
    )
