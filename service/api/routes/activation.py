"""Which adapter is the default, and which of its versions is current."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body

from service.api.activation import activate
from service.api.catalog import own, show
from service.api.deps import State, Tenant
from service.api.schemas.adapters import ActivateRequest, AdapterView, MergedView, RollbackRequest
from service.api.schemas.common import error_responses
from service.engine.selection import Mode

router = APIRouter(tags=["adapters"])


@router.post(
    "/v1/adapters/{name}/activate",
    response_model=MergedView | AdapterView,
    responses=error_responses(400, 401, 403, 404, 503),
)
async def activate_adapter(
    name: str, state: State, tenant: Tenant, body: Annotated[ActivateRequest | None, Body()] = None
) -> AdapterView:
    """Makes the adapter what requests run with that name none; with `merge`, folded in whenever the batch allows."""
    return await activate(state, tenant, name, Mode(body.mode) if body else Mode.SWITCH)


@router.post("/v1/adapters/{name}/deactivate", responses=error_responses(401, 403, 404, 503))
def deactivate_adapter(name: str, state: State, tenant: Tenant) -> AdapterView:
    """Back to the base model, if this adapter was active."""
    record = state.store.visible(tenant, name)
    state.store.deactivate(tenant, name)
    return show(state, tenant, record)


@router.post("/v1/adapters/{name}/rollback", responses=error_responses(400, 401, 403, 404, 503))
def roll_back_adapter(name: str, body: RollbackRequest, state: State, tenant: Tenant) -> AdapterView:
    """Makes an earlier version current. Running requests finish on the version they hold."""
    own(state, tenant, name)
    return show(state, tenant, state.store.rollback(tenant, name, body.digest))
