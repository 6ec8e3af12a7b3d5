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


class EventStream:
    """An accepted request's events, in order, on the event loop that created it.

        async with EventStream(engine, request, observe(…)) as events:
            async for event in events:
                ...

    Ends after the FinishedEvent; a FailedEvent is raised as ApiError. Whoever leaves earlier cancels the request.
    """

    def __init__(self, engine: Engine, request: GenerationRequest, observation: Observation) -> None:
        """Submits the request. Raises EngineError if the engine refuses it."""
        self._engine = engine
        self._id = request.request_id
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._first: Event | None = None
        self._ended = False
        self._observation = observation
        engine.submit(request, self._deliver)
        observation.accepted()

    async def __aenter__(self) -> EventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[PromptEvent | TokenEvent | FinishedEvent]:
        while not self._ended:
            event = await self._next()
            if isinstance(event, FailedEvent):
                raise failed(event)
            yield event

    async def started(self) -> None:
        """Waits for the first event, and keeps it. Raises ApiError if the request failed before any output."""
        self._first = event = await self._next()
        if isinstance(event, FailedEvent):
            raise failed(event)
        self._ended = False  # it is still to be read

    def close(self) -> None:
        """Cancels the request unless it has ended. Calling it again does nothing."""
        if not self._ended:
            self._ended = True
            self._engine.cancel(self._id)

    async def _next(self) -> Event:
        event, self._first = self._first or await self._queue.get(), None
        self._ended = isinstance(event, FinishedEvent | FailedEvent)
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


async def gather(events: EventStream, n: int) -> Gathered:
    """Every choice whole, and the event that ended the request. Raises ApiError if the request failed."""
    choices = [ChoiceText(index) for index in range(n)]
    prompt: tuple[TokenLogprob | None, ...] = ()
    async with events:
        async for event in events:
            match event:
                case FinishedEvent():
                    return Gathered(choices, event, prompt)
                case PromptEvent():
                    prompt = event.logprobs
                case TokenEvent():
                    choices[event.choice].add(event)
    raise AssertionError("the engine's events ended without a terminal event")
