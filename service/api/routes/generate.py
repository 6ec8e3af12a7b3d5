"""POST /v1/generate: the native route."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from service.api.choices import ChoiceWriter
from service.api.deps import ServerState, State, Tenant
from service.api.disconnect import unless_disconnected
from service.api.generation import EventStream, encode_prompt, gather, new_generation_id
from service.api.observation import observe
from service.api.schemas.common import error_responses
from service.api.schemas.generate import (
    GenerateDelta,
    GenerateRequest,
    GenerateResponse,
    SelectionView,
    TimingView,
    UsageView,
)
from service.api.selection import resolve
from service.api.sse import DONE, EventSourceResponse, data_frame
from service.engine.events import FinishedEvent, TokenEvent
from service.engine.sequence import GenerationRequest

router = APIRouter(tags=["generate"])

_RESPONSES = error_responses(400, 401, 404, 408, 413, 429, 503)
_RESPONSES[200] = {
    "description": "The choices; with `stream`, events with one delta each, then `data: [DONE]`",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


@router.post("/v1/generate", response_model=GenerateResponse, responses=_RESPONSES)
async def generate(body: GenerateRequest, request: Request, response: Response, state: State, tenant: Tenant) -> object:
    """Generates with the selection that the request names: an adapter, a blend, the base model, or the active one."""
    job = await to_thread.run_sync(partial(_prepare, state, tenant, body))
    headers = {"X-Adapter-Digest": job.request.selection.header}
    observation = observe(state, request.scope, job.request, prompt=body.prompt, stream=body.stream)
    events = EventStream(state.engine, job.request, observation)
    if not body.stream:
        answer = await unless_disconnected(request.receive, _answer(job, events))
        response.headers.update(headers)
        return answer
    try:
        await unless_disconnected(request.receive, events.started())
    except BaseException:
        events.close()
        raise
    return EventSourceResponse(_frames(job, events), headers=headers, on_close=events.close)


@dataclass(frozen=True, slots=True)
class _Job:
    """A request as the engine takes it, and how its answer is written."""

    request: GenerationRequest
    writer: ChoiceWriter
    model: str


def _prepare(state: ServerState, tenant: str, body: GenerateRequest) -> _Job:
    """Reads the store and tokenizes: not for the event loop."""
    selection = resolve(state, tenant, body.selection_spec())
    prompt_ids = encode_prompt(state.tokenizer, body.prompt)
    request = GenerationRequest(
        request_id=new_generation_id(),
        prompt_ids=prompt_ids,
        params=body.sampling(),
        selection=selection,
        n=body.n,
        tenant=tenant,
        timeout_s=_timeout(body.timeout_s, state.settings.request_timeout_s),
    )
    text = body.prompt if isinstance(body.prompt, str) else state.tokenizer.decode(prompt_ids)
    writer = ChoiceWriter(state.tokenizer, with_logprobs=body.logprobs is not None)
    return _Job(request, writer.echoing(text, prompt_ids) if body.echo else writer, state.settings.served_model_name)


def _timeout(asked: float | None, limit: float | None) -> float | None:
    """The request's own, within the server's."""
    given = [timeout for timeout in (asked, limit) if timeout is not None]
    return min(given, default=None)


async def _answer(job: _Job, events: EventStream) -> GenerateResponse:
    answer = await gather(events, job.request.n)
    return GenerateResponse(
        id=job.request.request_id,
        model=job.model,
        selection=SelectionView.of(job.request.selection, answer.finished.mode),
        choices=[job.writer.whole(choice) for choice in answer.choices],
        usage=UsageView.of(answer.finished.usage),
        timing=TimingView.of(answer.finished.timing),
    )


async def _frames(job: _Job, events: EventStream) -> AsyncGenerator[str, None]:
    """One frame for each event. The last choice's end is held back, to travel with what the FinishedEvent says."""
    running = job.request.n
    last: TokenEvent | None = None
    async with events:
        async for event in events:
            if isinstance(event, FinishedEvent):
                yield data_frame(_last_delta(job, last, event).model_dump_json(exclude_unset=True))
                continue
            assert isinstance(event, TokenEvent), "this route asks for no prompt's log-probabilities"
            running -= event.finish_reason is not None
            if running == 0:
                last = event
            else:
                yield data_frame(_delta(job, event).model_dump_json(exclude_unset=True))
    yield DONE


def _delta(job: _Job, event: TokenEvent) -> GenerateDelta:
    return GenerateDelta(id=job.request.request_id, model=job.model, choices=[job.writer.delta(event)])


def _last_delta(job: _Job, event: TokenEvent | None, finished: FinishedEvent) -> GenerateDelta:
    return GenerateDelta(
        id=job.request.request_id,
        model=job.model,
        choices=[] if event is None else [job.writer.delta(event)],
        selection=SelectionView.of(job.request.selection, finished.mode),
        usage=UsageView.of(finished.usage),
        timing=TimingView.of(finished.timing),
    )
