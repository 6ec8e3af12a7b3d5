"""POST /v1/embeddings: what it takes and what it answers, as OpenAI's clients know it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.api.schemas.common import ResponseModel
from service.api.schemas.pooled import PooledFields

MAX_DIMENSIONS = 1 << 20


class EmbeddingsRequest(PooledFields):
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="`base64`: float32, little endian. OpenAI's own client asks for it unasked"
    )
    dimensions: int | None = Field(
        None, ge=1, le=MAX_DIMENSIONS, description="Keeps so many of the first numbers, scaled to length 1 again"
    )


class Embedding(ResponseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(ResponseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(ResponseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingsUsage
