"""POST /v1/generate: the native route."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from service.api.choices import ChoiceWriter
from service.api.deps import GENERATES, HAS_ROOM, ServerState, State, Tenant
from service.api.generation import EventStream, encode_prompt, gather, new_generation_id, timeout_of
from service.api.receipt import ReceiptWriter, seeded
from service.api.respond import respond
from service.api.schemas.common import streaming_responses
from service.api.schemas.generate import (
    GenerateDelta,
    GenerateRequest,
    GenerateResponse,
    TimingView,
    UsageView,
)
from service.api.schemas.selected import SelectionView
from service.api.selection import resolve
from service.api.seq2seq import check_offered
from service.api.sse import DONE, data_frame
from service.engine.events import FinishedEvent, TokenEvent
from service.engine.sequence import GenerationRequest

router = APIRouter(tags=["generate"])


@router.post(
    "/v1/generate",
    response_model=GenerateResponse,
    response_model_exclude_unset=True,
    responses=streaming_responses(),
    dependencies=[GENERATES, HAS_ROOM],
)
async def generate(body: GenerateRequest, request: Request, response: Response, state: State, tenant: Tenant) -> object:
    """Generates with the selection that the request names: an adapter, a blend, the base model, or the active one."""
    writer = await to_thread.run_sync(partial(_prepare, state, tenant, body))
    return await respond(request, response, state, [writer.request], writer, stream=body.stream)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes the answer to one request."""

    request: GenerationRequest
    choices: ChoiceWriter
    receipt: ReceiptWriter
    model: str

    async def whole(self, events: EventStream) -> GenerateResponse:
        (answer,) = await gather(events, [self.request])
        response = GenerateResponse(
            id=self.request.request_id,
            model=self.model,
            selection=SelectionView.of(self.request.selection, answer.finished.mode),
            choices=[self.choices.whole(choice) for choice in answer.choices],
            usage=UsageView.of(answer.finished.usage),
            timing=TimingView.of(answer.finished.timing),
        )
        return self.receipt.whole(response, answer)

    async def frames(self, events: EventStream) -> AsyncGenerator[str, None]:
        """One for each event. The last choice's end is held back, to travel with what the FinishedEvent says."""
        running = self.request.n
        last: TokenEvent | None = None
        async with events:
            async for event in events:
                if isinstance(event, FinishedEvent):
                    end = self.receipt.last(self._last_delta(last, event), event)
                    yield data_frame(end.model_dump_json(exclude_unset=True))
                    continue
                assert isinstance(event, TokenEvent), "this route asks for no prompt's log-probabilities"
                self.receipt.saw(event)
                running -= event.finish_reason is not None
                if running == 0:
                    last = event
                else:
                    yield data_frame(self._delta(event).model_dump_json(exclude_unset=True))
        yield DONE

    def _delta(self, event: TokenEvent) -> GenerateDelta:
        return GenerateDelta(id=self.request.request_id, model=self.model, choices=[self.choices.delta(event)])

    def _last_delta(self, event: TokenEvent | None, finished: FinishedEvent) -> GenerateDelta:
        return GenerateDelta(
            id=self.request.request_id,
            model=self.model,
            choices=[] if event is None else [self.choices.delta(event)],
            selection=SelectionView.of(self.request.selection, finished.mode),
            usage=UsageView.of(finished.usage),
            timing=TimingView.of(finished.timing),
        )


def _prepare(state: ServerState, tenant: str, body: GenerateRequest) -> _Writer:
    """Reads the store and tokenizes: not for the event loop."""
    check_offered(state, body)
    selection = resolve(state, tenant, body.selection_spec())
    prompt_ids = encode_prompt(state.tokenizer, body.prompt)
    request = GenerationRequest(
        request_id=new_generation_id(),
        prompt_ids=prompt_ids,
        params=seeded(body.sampling()) if body.receipt else body.sampling(),
        selection=selection,
        n=body.n,
        tenant=tenant,
        timeout_s=timeout_of(body.timeout_s, state.settings.request_timeout_s),
        task=state.task,
    )
    text = body.prompt if isinstance(body.prompt, str) else state.tokenizer.decode(prompt_ids)
    choices = ChoiceWriter(state.tokenizer, with_logprobs=body.logprobs is not None)
    return _Writer(
        request,
        choices.echoing(text, prompt_ids) if body.echo else choices,
        ReceiptWriter(state.base, request, body.receipt),
        state.settings.served_model_name,
    )
