"""GET /v1/models: what a client may put into OpenAI's `model` field."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter

from adapters.errors import AdapterNotFound
from adapters.store import AdapterRecord
from service.api.deps import ServerState, State, Tenant
from service.api.errors import ApiError
from service.api.schemas.common import error_responses
from service.api.schemas.models import ModelCard, ModelList

router = APIRouter(tags=["models"])

_PAGE = 1000


@router.get("/v1/models", responses=error_responses(401))
def list_models(state: State, tenant: Tenant) -> ModelList:
    """The base model and every adapter."""
    adapters = [_adapter_card(state, record) for record in _all_records(state, tenant)]
    return ModelList(data=[_base_card(state), *adapters])


@router.get("/v1/models/{id:path}", responses=error_responses(401, 404))
def get_model(id: str, state: State, tenant: Tenant) -> ModelCard:
    """One of them, by any name that the base model answers to, or by an adapter's."""
    if state.settings.means_base(id):
        return _base_card(state)
    try:
        return _adapter_card(state, state.store.get(tenant, id))
    except AdapterNotFound:
        raise ApiError(
            "model_not_found", f"no model named {id[:140]!r}: GET /v1/models lists them", param="id"
        ) from None


def _all_records(state: ServerState, tenant: str) -> Iterator[AdapterRecord]:
    after = None
    while True:
        records, after = state.store.list(tenant, limit=_PAGE, after=after)
        yield from records
        if after is None:
            return


def _base_card(state: ServerState) -> ModelCard:
    return ModelCard(id=state.settings.served_model_name, created=state.base.created, root=state.base.id, parent=None)


def _adapter_card(state: ServerState, record: AdapterRecord) -> ModelCard:
    return ModelCard(
        id=record.name,
        created=int(record.created_at),
        root=state.base.id,
        parent=state.settings.served_model_name,
    )
