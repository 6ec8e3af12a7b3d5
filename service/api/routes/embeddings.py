"""POST /v1/embeddings: texts to vectors, as OpenAI's clients know it."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from service.api.deps import HAS_ROOM, ServerState, State, Tenant, serves
from service.api.errors import ApiError
from service.api.generation import EventStream, Gathered, gather
from service.api.openai import Envelope
from service.api.pooled import FIELDS, envelope, requests_of, select
from service.api.respond import respond
from service.api.schemas.common import error_responses
from service.api.schemas.embeddings import Embedding, EmbeddingsRequest, EmbeddingsResponse, EmbeddingsUsage
from service.engine.sequence import GenerationRequest
from service.engine.task import Task

router = APIRouter(tags=["pooling"])


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingsResponse,
    responses=error_responses(400, 401, 404, 408, 413, 429, 503),
    dependencies=[serves(Task.EMBED), HAS_ROOM],
)
async def embeddings(
    body: EmbeddingsRequest, request: Request, response: Response, state: State, tenant: Tenant
) -> object:
    """Embeds texts, with the selection that `model` names."""
    writer = await to_thread.run_sync(partial(_prepare, state, tenant, body))
    return await respond(
        request, response, state, writer.requests, writer, stream=False, answer_id=writer.answer.id, fields=FIELDS
    )


@dataclass(frozen=True, slots=True)
class _Writer:
    answer: Envelope
    requests: Sequence[GenerationRequest]
    dimensions: int | None
    normalize: bool
    as_base64: bool

    async def whole(self, events: EventStream) -> EmbeddingsResponse:
        read = await gather(events, self.requests)
        tokens = sum(each.finished.usage.prompt_tokens for each in read)
        return EmbeddingsResponse(
            id=self.answer.id,
            object="list",
            created=self.answer.created,
            model=self.answer.model,
            data=[Embedding(object="embedding", index=i, embedding=self._written(each)) for i, each in enumerate(read)],
            usage=EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens),
        )

    def frames(self, events: EventStream) -> AsyncGenerator[str, None]:
        raise AssertionError("this route does not stream")

    def _written(self, read: Gathered) -> list[float] | str:
        vector = read.finished.pooled
        assert vector is not None, "what was read has its answer"
        if self.dimensions is not None:
            vector = self._cut(vector, self.dimensions)
        if self.as_base64:
            return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        return list(vector)

    def _cut(self, vector: tuple[float, ...], dimensions: int) -> tuple[float, ...]:
        kept = vector[:dimensions]
        length = math.sqrt(sum(number * number for number in kept))
        return tuple(number / length for number in kept) if self.normalize and length else kept


def _prepare(state: ServerState, tenant: str, body: EmbeddingsRequest) -> _Writer:
    """Reads the store and tokenizes: not for the event loop."""
    assert state.pooled is not None, "the route is for tasks that pool"
    if body.dimensions is not None and body.dimensions > state.pooled.width:
        raise ApiError(
            "invalid_request",
            f"dimensions is {body.dimensions:,}, and this model's embeddings have {state.pooled.width:,}: give less",
            param="dimensions",
        )
    selection = select(state, tenant, body)
    answer = envelope(state, "embd", body, selection)
    requests = requests_of(state, tenant, body, answer, selection)
    return _Writer(
        answer, requests, body.dimensions, state.pooled.normalize, as_base64=body.encoding_format == "base64"
    )
