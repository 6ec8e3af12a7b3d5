"""POST /v1/classify: what it takes and what it answers, as vLLM's clients know it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.api.schemas.common import ResponseModel
from service.api.schemas.pooled import PooledFields
from service.api.schemas.selected import SelectionView


class ClassifyRequest(PooledFields):
    use_activation: bool | None = Field(
        None,
        description="False: `probs` are the head's logits as they are; by default they become probabilities",
    )


class Classification(ResponseModel):
    """`label` is the likeliest class's name; `probs` are in the order of the classes."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class PooledUsage(ResponseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ClassifyResponse(ResponseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    selection: SelectionView
    data: list[Classification]
    usage: PooledUsage
