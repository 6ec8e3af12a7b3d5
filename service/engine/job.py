"""One accepted request on its way through the engine: its choices, its pins, its clock, and its one terminal event."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from adapters.factors import AdapterFactors
from service.engine.detokenizer import Decoder, TextStream
from service.engine.events import (
    EventSink,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    PromptEvent,
    Timing,
    TokenEvent,
    TokenLogprob,
    Usage,
)
from service.engine.guide import Guide
from service.engine.outlet import Outlet
from service.engine.sampler import choice_generator
from service.engine.selection import Mode
from service.engine.sequence import GenerationRequest, Sequence, SequenceStatus

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Choice:
    """What one choice needs besides its tokens: the generator it draws from, the text it has become, what guides it."""

    sequence: Sequence
    generator: torch.Generator
    text: TextStream
    guide: Guide | None = None


@dataclass(slots=True, eq=False)
class Job:
    """Written by the engine's thread alone.

    Except, by the engine's doors under their lock, `overtaken`, and `factors` before the job is handed over; and what
    `give_up` sends.
    """

    request: GenerationRequest
    outlet: Outlet
    choices: list[Choice]
    submitted: float
    factors: tuple[AdapterFactors, ...] = ()
    on_end: Callable[[Job], None] = lambda job: None
    overtaken: int = 0  # by how many later ones, while it waits for memory for its adapters
    started: float | None = None
    first_token: float | None = None
    merged: bool = False  # whether every step so far ran folded
    ended: bool = False
    pooled: tuple[float, ...] | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])  # nothing precedes the first
    is_scoring: bool = field(init=False)
    _open: int = field(init=False)

    def __post_init__(self) -> None:
        self._open = len(self.choices)
        self.is_scoring = self.request.params.prompt_logprobs is not None

    @property
    def sequences(self) -> list[Sequence]:
        return [choice.sequence for choice in self.choices]

    @property
    def deadline(self) -> float | None:
        return None if self.request.timeout_s is None else self.submitted + self.request.timeout_s

    def mark_step(self, *, folded: bool) -> None:
        """Before a step that runs choices of this job."""
        if self.started is None:
            self.started, self.merged = time.monotonic(), folded
        self.merged = self.merged and folded

    def take_token(
        self, choice: Choice, token_id: int, reason: FinishReason | None, logprob: TokenLogprob | None, *, hidden: bool
    ) -> None:
        """One more token of a choice, and its end if `reason` says so. A `hidden` token (EOS) has no text."""
        self.first_token = self.first_token or time.monotonic()
        choice.sequence.output_ids.append(token_id)
        text = "" if hidden else choice.text.push(token_id)
        if choice.text.stopped:
            reason = FinishReason.STOP
        elif reason is not None:
            text += choice.text.finish()
        if choice.text.stopped:  # a stop string may be complete only in what was held back
            reason = FinishReason.STOP
        logprobs = () if logprob is None else (logprob,)
        self.outlet.send(
            TokenEvent(self.request.request_id, choice.sequence.choice, (token_id,), text, logprobs, reason)
        )
        if reason is not None:
            self._close(choice)

    def take_prompt_logprobs(self, logprobs: Iterable[TokenLogprob]) -> None:
        """Those of more tokens of the prompt; once they are all there, they are sent, before any token is."""
        self.prompt_logprobs += logprobs
        if self.is_scoring and len(self.prompt_logprobs) == len(self.request.prompt_ids):
            self.is_scoring = False
            self.outlet.send(PromptEvent(self.request.request_id, tuple(self.prompt_logprobs)))

    def finish_without_tokens(self, choice: Choice) -> None:
        """The end of a choice that was asked for nothing but its prompt."""
        self.outlet.send(
            TokenEvent(self.request.request_id, choice.sequence.choice, (), "", finish_reason=FinishReason.LENGTH)
        )
        self._close(choice)

    def finish_pooled(self, choice: Choice, pooled: tuple[float, ...]) -> None:
        """The end of a text that was read, with what came of it."""
        self.pooled = pooled
        self.outlet.send(
            TokenEvent(self.request.request_id, choice.sequence.choice, (), "", finish_reason=FinishReason.STOP)
        )
        self._close(choice)

    def cancel(self) -> None:
        """Ends every open choice as cancelled."""
        for choice in self.choices:
            if choice.sequence.status is not SequenceStatus.FINISHED:
                self.outlet.send(
                    TokenEvent(
                        self.request.request_id,
                        choice.sequence.choice,
                        (),
                        choice.text.finish(),
                        finish_reason=FinishReason.CANCELLED,
                    )
                )
                self._close(choice)

    def fail(self, code: str, message: str) -> None:
        """Ends the request with FailedEvent. A request that has ended already stays as it ended."""
        if self.ended:
            return
        for sequence in self.sequences:
            sequence.status = SequenceStatus.FINISHED
        self._end(FailedEvent(self.request.request_id, code, message))

    def give_up(self, code: str, message: str) -> None:
        """From any thread: says that the request has failed, while the engine's thread holds it still.

        Whatever that thread makes of it later, nobody is told.
        """
        self._tell(FailedEvent(self.request.request_id, code, message))

    def _close(self, choice: Choice) -> None:
        choice.sequence.status = SequenceStatus.FINISHED
        self._open -= 1
        if self._open == 0:
            self._end(self._finished())

    def _finished(self) -> FinishedEvent:
        now = time.monotonic()
        output = sum(len(sequence.output_ids) for sequence in self.sequences)
        timing = Timing(
            queue_s=(self.started or now) - self.submitted,
            first_token_s=(self.first_token or now) - self.submitted,
            total_s=now - self.submitted,
        )
        mode = Mode.MERGE if self.merged else Mode.SWITCH
        usage = Usage(len(self.request.prompt_ids), output, self.sequences[0].cached)
        return FinishedEvent(self.request.request_id, usage, timing, mode, self.pooled)

    def _end(self, event: FinishedEvent | FailedEvent) -> None:
        assert not self.ended, "a request ended twice"
        self.ended = True
        self._tell(event)
        self.on_end(self)

    def _tell(self, last: FinishedEvent | FailedEvent) -> None:
        try:
            self.outlet.close(last)
        except Exception:
            # A sink belongs to the caller; its failure must not take the engine's thread down. What it raises for any
            # other event ends the request: an answer with a hole must not look whole.
            log.exception("the event sink of request %s failed", self.request.request_id)


def make_job(request: GenerationRequest, sink: EventSink, decoder: Decoder, on_end: Callable[[Job], None]) -> Job:
    """A job that has not begun; without a seed it draws one."""
    now = time.monotonic()
    seed = request.params.seed if request.params.seed is not None else secrets.randbits(62)
    choices = [
        Choice(
            Sequence(request, i, now),
            choice_generator(seed, i),
            TextStream(decoder, request.params.stop, request.continued_ids),
            None if request.grammar is None else request.grammar.start(),
        )
        for i in range(request.n)
    ]
    return Job(request, Outlet(sink), choices, now, on_end=on_end)
