"""GET /v1/models: what a client may put into OpenAI's `model` field."""

from __future__ import annotations

from fastapi import APIRouter

from adapters.errors import AdapterNotFound
from service.api.deps import ServerState, State, Tenant
from service.api.errors import ApiError
from service.api.schemas.common import error_responses
from service.api.schemas.models import ModelCard, ModelList

router = APIRouter(tags=["models"])


@router.get("/v1/models", responses=error_responses(401))
def list_models(state: State, tenant: Tenant) -> ModelList:
    """The base model and every adapter."""
    adapters = [_adapter_card(state, name, created_at) for name, created_at in state.store.names(tenant)]
    return ModelList(data=[_base_card(state), *adapters])


@router.get("/v1/models/{id:path}", responses=error_responses(401, 404))
def get_model(id: str, state: State, tenant: Tenant) -> ModelCard:
    """One of them, by any name that the base model answers to, or by an adapter's."""
    if state.settings.means_base(id):
        return _base_card(state)
    try:
        record = state.store.visible(tenant, id)
    except AdapterNotFound:
        raise ApiError(
            "model_not_found", f"no model named {id[:140]!r}: GET /v1/models lists them", param="id"
        ) from None
    return _adapter_card(state, record.name, record.created_at)


def _base_card(state: ServerState) -> ModelCard:
    return ModelCard(id=state.settings.served_model_name, created=state.base.created, root=state.base.id, parent=None)


def _adapter_card(state: ServerState, name: str, created_at: float) -> ModelCard:
    return ModelCard(
        id=name,
        created=int(created_at),
        root=state.base.id,
        parent=state.settings.served_model_name,
    )
