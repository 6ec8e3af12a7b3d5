"""All that the engine says back about a request.

A request's events are a PromptEvent if it asked for one, any number of TokenEvents, and then exactly one terminal
event: FinishedEvent or FailedEvent.
They are delivered to the sink that came with the request, from the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a choice ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability in the raw distribution, and the likeliest tokens of its position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """The log-probability of every token of the prompt, given those before it; None for the first."""

    request_id: str
    logprobs: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New output of one choice.

    `text` is what can be shown now: it is held back while a character is half received or a stop string might begin, so
    it may be empty, and comes to the whole text when all of a choice's events are joined. The choice's last event
    carries `finish_reason`.
    """

    request_id: str
    choice: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """`cached_tokens` of the prompt were found in the prefix cache; the other choices of a request find more."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds since the request was submitted: to its first step, to its first token, to its end."""

    queue_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """Terminal: every choice has ended. `mode` says how the selection ran: "switch" or "merge".

    `pooled` is the answer of a task that pools: a classifier's logits, or an embedding.
    """

    request_id: str
    usage: Usage
    timing: Timing
    mode: str
    pooled: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """Terminal: the request was accepted and could not be answered. `code` is one of the error envelope's codes."""

    request_id: str
    code: str
    message: str


Event = PromptEvent | TokenEvent | FinishedEvent | FailedEvent
EventSink = Callable[[Event], None]
