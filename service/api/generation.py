"""One request's way through the engine: its prompt encoded, its events brought to the event loop, its answer gathered.

What is here serves every route that generates; the routes only differ in what they ask and how they answer.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

from service.api.deps import Tokenizer
from service.api.errors import ApiError, failed
from service.api.observation import Observation
from service.engine.events import (
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    PromptEvent,
    TokenEvent,
    TokenLogprob,
)
from service.engine.seam import Engine
from service.engine.sequence import GenerationRequest


def new_generation_id() -> str:
    """Not the X-Request-ID: a client may send the same one twice."""
    return f"gen-{uuid.uuid4().hex}"


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> tuple[int, ...]:
    """The prompt's token ids; an empty prompt is the BOS token alone. Raises ApiError if there is none."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if ids:
        return tuple(ids)
    if tokenizer.bos_token_id is None:
        raise ApiError(
            "invalid_request",
            "the prompt is empty and this model has no BOS token to begin with: give at least one token",
            param="prompt",
        )
    return (tokenizer.bos_token_id,)


def timeout_of(asked: float | None, limit: float | None) -> float | None:
    """The request's own, within the server's."""
    given = [timeout for timeout in (asked, limit) if timeout is not None]
    return min(given, default=None)


class EventStream:
    """The events of accepted requests, those of each in order, on the event loop that created it.

        async with EventStream(engine, requests, observation) as events:
            async for event in events:
                ...

    Ends after the last FinishedEvent; a FailedEvent is raised as ApiError. Whoever leaves earlier cancels what runs.
    """

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest], observation: Observation) -> None:
        """Submits the requests. Raises EngineError if the engine refuses them."""
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._first: Event | None = None
        self._observation = observation
        engine.submit(requests, self._deliver)
        self._open = {request.request_id for request in requests}  # those that have not ended
        for request in requests:
            observation.accepted(request)

    async def __aenter__(self) -> EventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[PromptEvent | TokenEvent | FinishedEvent]:
        while self._first is not None or self._open:
            event = await self._next()
            if isinstance(event, FailedEvent):
                raise failed(event)
            yield event

    async def started(self) -> None:
        """Waits for the first event, and keeps it. Raises ApiError if the request failed before any output."""
        self._first = event = await self._next()
        if isinstance(event, FailedEvent):
            raise failed(event)

    def close(self) -> None:
        """Cancels the requests that have not ended. Calling it again does nothing."""
        while self._open:
            self._engine.cancel(self._open.pop())

    async def _next(self) -> Event:
        event, self._first = self._first or await self._queue.get(), None
        if isinstance(event, FinishedEvent | FailedEvent):
            self._open.discard(event.request_id)
        return event

    def _deliver(self, event: Event) -> None:
        """Called from the engine's threads. A loop that is closed has nobody left to tell."""
        moment = time.monotonic()  # here, as a busy loop must not count as the engine's time
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrived, event, moment)

    def _arrived(self, event: Event, moment: float) -> None:
        """Also of a request that was left: it is observed to its end."""
        self._queue.put_nowait(event)
        self._observation.saw(event, moment)


@dataclass(slots=True)
class ChoiceText:
    """One choice as it grows, and in the end its whole output."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, event: TokenEvent) -> None:
        self.text += event.text
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.finish_reason = event.finish_reason


@dataclass(frozen=True, slots=True)
class Gathered:
    """A whole answer. `prompt_logprobs` is empty unless they were asked for."""

    choices: list[ChoiceText]
    finished: FinishedEvent
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


async def gather(events: EventStream, requests: Sequence[GenerationRequest]) -> list[Gathered]:
    """The whole answer to each of the stream's requests, in their order. Raises ApiError if one failed."""
    choices = {request.request_id: [ChoiceText(index) for index in range(request.n)] for request in requests}
    prompts: dict[str, tuple[TokenLogprob | None, ...]] = {}
    finished: dict[str, FinishedEvent] = {}
    async with events:
        async for event in events:
            match event:
                case FinishedEvent():
                    finished[event.request_id] = event
                case PromptEvent():
                    prompts[event.request_id] = event.logprobs
                case TokenEvent():
                    choices[event.request_id][event.choice].add(event)
    ids = [request.request_id for request in requests]
    return [Gathered(choices[each], finished[each], prompts.get(each, ())) for each in ids]
