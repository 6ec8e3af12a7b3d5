"""vLLM's routes to load and unload adapters while serving, for scripts that call them. They answer in plain text.

To load is to register the adapter as `POST /v1/adapters` with a source does, to unload is to delete it.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from adapters.errors import AdapterNotFound
from adapters.store import check_name, digest_of
from service.api.catalog import delete
from service.api.deps import ServerState, State, Tenant
from service.api.errors import ApiError
from service.api.hub_ids import HubRepo
from service.api.registration import register
from service.api.schemas.common import error_responses
from service.api.schemas.lora import LoadLoraRequest, UnloadLoraRequest
from service.api.sources import fetch_source

router = APIRouter(tags=["vLLM"])


_PLAIN_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.post(
    "/v1/load_lora_adapter", responses=_PLAIN_TEXT | error_responses(400, 401, 403, 408, 409, 413, 415, 422, 503, 507)
)
async def load_lora_adapter(body: LoadLoraRequest, state: State, tenant: Tenant) -> PlainTextResponse:
    """Registers an adapter from a directory of the server or from the Hub. To load the same files again succeeds."""
    check_name(body.lora_name, state.settings.base_names)
    with state.store.staging() as staged:
        source = await to_thread.run_sync(_fetch, body.lora_path, staged, state, limiter=state.fetching)
        registering = partial(_register, state, tenant, body, staged, source)
        await to_thread.run_sync(registering, limiter=state.registering)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=_PLAIN_TEXT | error_responses(400, 401, 403, 404, 503))
def unload_lora_adapter(body: UnloadLoraRequest, state: State, tenant: Tenant) -> PlainTextResponse:
    """Forgets an adapter with all its versions. Running requests finish on the version they hold."""
    delete(state, tenant, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _fetch(path: str, staged: Path, state: ServerState) -> str:
    """Stages the adapter; where it came from."""
    try:
        return fetch_source(_source(path), staged, state)
    except ApiError as error:
        param = "lora_path" if error.param == "source" else error.param
        raise ApiError(error.code, error.message, param=param) from error


def _register(state: ServerState, tenant: str, body: LoadLoraRequest, staged: Path, source: str) -> None:
    """Registers the staged files, unless they are what the name stands for already."""
    if _current_digest(state, tenant, body.lora_name) != digest_of(staged):
        register(state.registry, tenant, body.lora_name, staged, replace=body.load_inplace, source=source)


def _source(path: str) -> str:
    """The path as a source: `org/repo`, which vLLM looks up on the Hub, is no absolute path and means the Hub."""
    if os.path.isabs(path):
        return path
    try:
        return str(HubRepo.parse(path))
    except ValueError:
        return path


def _current_digest(state: ServerState, tenant: str, name: str) -> str | None:
    try:
        return state.store.get(tenant, name).digest
    except AdapterNotFound:
        return None
