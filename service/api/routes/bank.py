"""GET /v1/adapters/{name}/bank: which vectors of its bank an adapter is mixed from."""

from __future__ import annotations

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, Response

from adapters.bank_usage import bank_usage
from adapters.checkpoint import TopKCheckpoint
from service.api.deps import ServerState, State, Tenant
from service.api.errors import ApiError
from service.api.schemas.bank import BankQuery, BankView, LayerUsage
from service.api.schemas.common import error_responses

router = APIRouter(tags=["adapters"])

_DIGITS = 7  # behind the point: a row of 1,024 numbers still sums to 1 within 1e-4


@router.get("/v1/adapters/{name}/bank", response_model=BankView, responses=error_responses(400, 401, 404, 503))
async def bank(name: str, query: Annotated[BankQuery, Query()], state: State, tenant: Tenant) -> Response:
    """Which bank vectors each layer of the adapter's current version uses, and how much."""
    # It may hold a whole checkpoint, and writes megabytes of a large one: few at once.
    content = await to_thread.run_sync(_show, state, tenant, name, query.columns, limiter=state.describing)
    return Response(content, media_type="application/json")


def _show(state: ServerState, tenant: str, name: str, columns: int) -> str:
    """A BankView in JSON."""
    record = state.store.visible(tenant, name)
    checkpoint = state.registry.compact(record.digest)
    if not isinstance(checkpoint, TopKCheckpoint):
        raise ApiError(
            "invalid_request", f"{name!r} is a plain LoRA adapter, which has no vector bank: ask for one of VB-LoRA"
        )
    usage, config = bank_usage(checkpoint, columns), checkpoint.config
    shares = usage.shares.round(decimals=_DIGITS).tolist()
    view = BankView(
        adapter=record.name,
        digest=record.digest,
        num_vectors=config.num_vectors,
        vector_length=config.vector_length,
        topk=config.topk,
        columns=usage.shares.shape[-1],
        vectors_per_column=usage.vectors_per_column,
        used_vectors=usage.used_vectors,
        unused_vectors=config.num_vectors - usage.used_vectors,
        layers=[LayerUsage(name=layer, A=a, B=b) for layer, (a, b) in zip(usage.layers, shares, strict=True)],
    )
    return view.model_dump_json()
