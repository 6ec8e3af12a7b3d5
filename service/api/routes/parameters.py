"""How many parameters: of the base model, of each adapter, and of one that is only planned."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from adapters.config import VBLoRAConfig
from adapters.parameters import count_parameters
from adapters.store import AdapterRecord
from adapters.targets import LayerShape, check_tiling
from service.api.deps import State, Tenant
from service.api.schemas.adapters import PageQuery
from service.api.schemas.common import error_responses
from service.api.schemas.parameters import BaseParametersView, EstimateRequest, ParametersPage, ParametersView

router = APIRouter(tags=["parameters"])


@router.get("/v1/adapters/{name}/parameters", responses=error_responses(401, 404))
def adapter_parameters(name: str, state: State, tenant: Tenant) -> ParametersView:
    """The parameter count of an adapter's current version."""
    return _show(state.store.visible(tenant, name))


@router.get("/v1/parameters", responses=error_responses(400, 401))
def all_parameters(query: Annotated[PageQuery, Query()], state: State, tenant: Tenant) -> ParametersPage:
    """The base model's count, and each adapter's, page by page."""
    records, following = state.store.list(tenant, limit=query.limit, after=query.after)
    base = BaseParametersView(
        id=state.settings.served_model_name, model_type=state.base.model_type, total_params=state.base.parameters
    )
    return ParametersPage(base=base, adapters=[_show(record) for record in records], next=following)


@router.post("/v1/parameters/estimate", responses=error_responses(400, 401, 415, 422))
def estimate_parameters(body: EstimateRequest, state: State) -> ParametersView:
    """What an adapter with this config would count, on the loaded base model or on the layers given."""
    config = VBLoRAConfig.from_dict({"peft_type": "VBLORA", **body.config})
    if body.layers is None:
        layers = state.base.modules.selected_by(config)
    else:
        layers = [LayerShape(layer.name, layer.in_features, layer.out_features) for layer in body.layers]
    for layer in layers:
        check_tiling(layer, config.vector_length)
    counts = count_parameters(config, layers).to_dict()
    return ParametersView(adapter=None, digest=None, file_bytes=None, **counts)


def _show(record: AdapterRecord) -> ParametersView:
    return ParametersView(
        adapter=record.name, digest=record.digest, file_bytes=record.file_bytes, **record.info["parameters"]
    )
