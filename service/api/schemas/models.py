"""Models as OpenAI's clients list them: the base model, and every adapter as a model of its own."""

from __future__ import annotations

from typing import Literal

from service.api.schemas.common import ResponseModel


class ModelCard(ResponseModel):
    """`parent` is null for the base model and names it for an adapter; `root` is the base model of both."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vblora-serve"
    root: str
    parent: str | None


class ModelList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
