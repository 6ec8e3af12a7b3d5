"""POST /v1/classify: texts to classes, each adapter with a head of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from service.api.deps import HAS_ROOM, ServerState, State, Tenant, serves
from service.api.generation import EventStream, Gathered, gather
from service.api.labels import Classes, classes_of
from service.api.openai import Envelope
from service.api.pooled import FIELDS, envelope, requests_of, select
from service.api.respond import respond
from service.api.schemas.classify import Classification, ClassifyRequest, ClassifyResponse, PooledUsage
from service.api.schemas.common import error_responses
from service.api.schemas.selected import SelectionView
from service.engine.sequence import GenerationRequest
from service.engine.task import Task

router = APIRouter(tags=["pooling"])


@router.post(
    "/v1/classify",
    response_model=ClassifyResponse,
    responses=error_responses(400, 401, 404, 408, 413, 429, 503),
    dependencies=[serves(Task.CLASSIFY), HAS_ROOM],
)
async def classify(body: ClassifyRequest, request: Request, response: Response, state: State, tenant: Tenant) -> object:
    """Classifies texts, or pairs of texts, with the head of the adapter that the request names."""
    writer = await to_thread.run_sync(partial(_prepare, state, tenant, body))
    return await respond(
        request, response, state, writer.requests, writer, stream=False, answer_id=writer.answer.id, fields=FIELDS
    )


@dataclass(frozen=True, slots=True)
class _Writer:
    answer: Envelope
    requests: Sequence[GenerationRequest]
    classes: Classes
    as_probabilities: bool

    async def whole(self, events: EventStream) -> ClassifyResponse:
        read = await gather(events, self.requests)
        tokens = sum(each.finished.usage.prompt_tokens for each in read)
        return ClassifyResponse(
            id=self.answer.id,
            object="list",
            created=self.answer.created,
            model=self.answer.model,
            selection=SelectionView.of(self.requests[0].selection, read[-1].finished.mode),
            data=[self._classified(index, each) for index, each in enumerate(read)],
            usage=PooledUsage(prompt_tokens=tokens, total_tokens=tokens),
        )

    def frames(self, events: EventStream) -> AsyncGenerator[str, None]:
        raise AssertionError("this route does not stream")

    def _classified(self, index: int, read: Gathered) -> Classification:
        logits = read.finished.pooled
        assert logits is not None, "what was read has its answer"
        assert len(logits) == len(self.classes.names), "the head that ran is the one that was named"
        probs = self.classes.probabilities(logits) if self.as_probabilities else list(logits)
        likeliest = max(range(len(logits)), key=logits.__getitem__)
        return Classification(index=index, label=self.classes.names[likeliest], probs=probs, num_classes=len(logits))


def _prepare(state: ServerState, tenant: str, body: ClassifyRequest) -> _Writer:
    """Reads the store and tokenizes: not for the event loop."""
    selection = select(state, tenant, body)
    classes = classes_of(state, selection)
    answer = envelope(state, "classify", body, selection)
    requests = requests_of(state, tenant, body, answer, selection)
    return _Writer(answer, requests, classes, body.use_activation is not False)
