"""Parameter counts, of adapters that exist and of one that does not yet."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from service.api.schemas.common import RequestModel, ResponseModel, Text

_MAX_FEATURES = 2**31 - 1


class LayerSpec(RequestModel):
    """A linear layer that the adapter would adapt."""

    name: Text
    in_features: int = Field(ge=1, le=_MAX_FEATURES)
    out_features: int = Field(ge=1, le=_MAX_FEATURES)


class EstimateRequest(RequestModel):
    config: dict[str, Any] = Field(
        description="The fields of PEFT's VBLoRAConfig; peft_type may be left out",
        examples=[{"r": 4, "num_vectors": 64, "vector_length": 32, "topk": 2, "target_modules": ["q_proj", "v_proj"]}],
    )
    layers: list[LayerSpec] | None = Field(
        None, min_length=1, description="Default: what the config selects in the loaded base model"
    )


class ParametersView(ResponseModel):
    """The count as PEFT's `print_savable_parameters` makes it; `summary` is the line that it prints.

    `vblora_params` is in float32-equivalents, the `topk_…_params` are raw element counts. `full_logits_params` is what
    the same adapter counts with full logits, `lora_params` plain LoRA of the same rank on the same layers.
    `adapter`, `digest` and `file_bytes` are null in an estimate.
    """

    adapter: str | None
    digest: str | None
    storage: str
    vblora_params: int
    other_params: int
    total_params: int
    vector_bank_params: int
    logits_params: int
    logit_positions: int
    topk_indices_params: int
    topk_weights_params: int
    index_dtype: str
    full_logits_params: int
    lora_params: int
    r: int
    num_vectors: int
    vector_length: int
    topk: int
    file_bytes: int | None
    summary: str


class BaseParametersView(ResponseModel):
    id: str
    model_type: str
    total_params: int


class ParametersPage(ResponseModel):
    base: BaseParametersView
    adapters: list[ParametersView]
    next: str | None = Field(description="Ask for the next page with ?after=; null on the last one")
