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
    the same adapter counts with full logits, `lora_params` plain LoRA of the same rank on the same layers. Of a plain
    LoRA adapter (`storage` is `lora`) `lora_params` is its own count, and whatever is VB-LoRA's is null.
    `adapter`, `digest` and `file_bytes` are null in an estimate.
    """

    adapter: str | None
    digest: str | None
    storage: str
    vblora_params: int | None
    other_params: int
    total_params: int
    vector_bank_params: int | None
    logits_params: int | None
    logit_positions: int | None
    topk_indices_params: int | None
    topk_weights_params: int | None
    index_dtype: str | None
    full_logits_params: int | None
    lora_params: int
    r: int
    num_vectors: int | None
    vector_length: int | None
    topk: int | None
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
