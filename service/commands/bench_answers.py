"""Streams as servers write them, ours and OpenAI-compatible ones: the tokens, when each came, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from service.commands.bench_plan import Ask

Event = tuple[float, bytes, bytes]
"""When a line of data came, the type of its event (empty: a plain one), and the data."""

_DONE = b"[DONE]"
_ERROR_TYPE = b"error"
_BROKEN_REASONS = frozenset({"abort", "error"})


class Dialect(StrEnum):
    NATIVE = "native"
    OPENAI = "openai"

    @property
    def path(self) -> str:
        return "/v1/generate" if self is Dialect.NATIVE else "/v1/completions"

    def body(self, ask: Ask, *, ignore_eos: bool) -> dict[str, Any]:
        """What is posted for a request."""
        body: dict[str, Any] = {"prompt": ask.prompt, "temperature": 0, "stream": True}
        if self is Dialect.NATIVE:
            body |= {"adapter": ask.adapter, "max_new_tokens": ask.max_new_tokens}
        else:
            body |= {"model": ask.adapter, "max_tokens": ask.max_new_tokens, "stream_options": {"include_usage": True}}
        return body | ({"ignore_eos": True} if ignore_eos else {})


class AnswerFailed(Exception):
    """A request that was not answered to the end. `code` is the server's, or says what became of the stream."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `times` are when tokens came, as far as events tell them apart; the counts are the server's."""

    times: tuple[float, ...]
    input_tokens: int
    output_tokens: int


class StreamReader:
    """Takes bytes as they come, and keeps the events in them. Parsing waits for the end, so as not to delay reading."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rest = b""
        self._type = b""
        self.events: list[Event] = []

    def feed(self, data: bytes) -> None:
        now = self._clock()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            name, _, value = line.rstrip(b"\r").partition(b":")
            if not name:
                self._type = b""
            elif name == b"event":
                self._type = value.strip()
            elif name == b"data":
                self.events.append((now, self._type, value.strip()))


def read_answer(events: Sequence[Event], dialect: Dialect) -> Answer:
    """The answer that a stream's events make. Raises AnswerFailed for an error in it, and for one that broke off."""
    times: list[float] = []
    usage: dict[str, Any] = {}
    finished = done = False
    for when, kind, data in events:
        if data == _DONE:
            done = True
            break
        value = _parsed(kind, data)
        choices = [choice for choice in _listed(value.get("choices")) if isinstance(choice, dict)]
        finished = finished or any(_has_finished(choice) for choice in choices)
        times += [when] * sum(_tokens(choice, dialect) for choice in choices)
        usage = value["usage"] if isinstance(value.get("usage"), dict) else usage
    if not (done and finished):
        raise AnswerFailed("truncated", f"the stream broke off after {len(times)} tokens")
    return Answer(
        tuple(times), _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")) or len(times)
    )


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _count(value: Any) -> int:
    """A server's count; 0 if that is none."""
    return value if type(value) is int and value > 0 else 0


def _parsed(kind: bytes, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # the latter of brackets without end
        value = None
    if not isinstance(value, dict):
        raise AnswerFailed("invalid_event", f"an event is no JSON object: {data[:80].decode(errors='replace')}")
    if kind == _ERROR_TYPE or "error" in value:
        raise error_of(value, "stream_error")
    return value


def error_of(body: Any, otherwise: str) -> AnswerFailed:
    """What an error's envelope says. Servers that are not ours may have no code in it, or a number."""
    error = body.get("error", body) if isinstance(body, dict) else {}
    fields = error if isinstance(error, dict) else {"message": error}
    code = fields.get("code")
    return AnswerFailed(code if isinstance(code, str) and code else otherwise, str(fields.get("message") or otherwise))


def _has_finished(choice: dict[str, Any]) -> bool:
    reason = choice.get("finish_reason")
    if isinstance(reason, str) and reason in _BROKEN_REASONS:
        raise AnswerFailed(f"finish_{reason}", f"the server ended the answer with {reason!r}")
    return reason is not None


def _tokens(choice: dict[str, Any], dialect: Dialect) -> int:
    """How many tokens an event brings; OpenAI's do not say, and count as one."""
    if dialect is Dialect.NATIVE:
        return len(_listed(choice.get("token_ids")))
    return 1 if choice.get("text") else 0
