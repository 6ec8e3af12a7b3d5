"""What the server's page is drawn from: one moment of the server, and what the page's reader may do."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.api.deps import State, Tenant
from service.api.keys import Scope, key_of
from service.api.schemas.common import error_responses
from service.api.schemas.stats import Identity, StatsView
from service.api.stats import show_stats

router = APIRouter(tags=["health"])


@router.get("/v1/stats", responses=error_responses(401))
def stats(state: State, tenant: Tenant) -> StatsView:
    """What runs at this moment, what waits, how long it takes and what memory it has."""
    return show_stats(state, tenant)


@router.get("/v1/whoami", responses=error_responses(401))
async def who_am_i(request: Request, state: State, tenant: Tenant) -> Identity:
    """Whose the request's key is and what it allows; without keys, everything is allowed."""
    key = key_of(request.scope)
    allowed = frozenset(Scope) if key is None else key.scopes
    return Identity(
        tenant=tenant,
        scopes=[scope for scope in (Scope.INFER, Scope.ADMIN) if scope in allowed],
        keys_required=bool(state.keys),
        task=state.task,
    )
