"""Stand-ins for the expensive neighbours of the HTTP layer, as narrow as the protocols that it asks for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from adapters.merge import FoldReport
from service.engine.events import (
    Event,
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
from service.engine.seam import EngineState, EngineStats
from service.engine.selection import Selection
from service.engine.sequence import GenerationRequest


@dataclass(frozen=True)
class Failure:
    """Fails an accepted request once so many steps are done."""

    code: str
    message: str
    after: int = 0


class FakeEngine:
    """Answers with the selection's own header, repeated: a request that ran something else shows it in its text.

    Or with `script`, to its end; a request's grammar is held to it. The prompt's tokens are as likely as they are long.

    Every request runs on a thread of its own, one byte of text and one token (that byte) a step. `refusal` is raised by
    `submit`, `full` by `check_room`, `fold_error` by folds; `failure` ends requests; `gate` holds every step until it
    is set, and with `hold_after` it closes by itself after so many steps. What a text is read as is `pooled`. Its stats
    are what `stats_now` says.
    """

    def __init__(self) -> None:
        self.state = EngineState.READY
        self.max_context, self.max_batch_size, self.max_queue = 256, 16, 64
        self.stats_now = EngineStats(0, 0, 0, 0, 0, 0)
        self.requests: list[GenerationRequest] = []
        self.folded: list[Selection] = []
        self.refusal: Exception | None = None
        self.full: Exception | None = None
        self.failure: Failure | None = None
        self.fold_error: Exception | None = None
        self.fold_never_comes = False
        self.script: str | None = None
        self.pooled = (0.5, -0.25)
        self.hold_after: int | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.submitted = threading.Event()
        self.cancelled = threading.Event()
        self._cancelled_ids: set[str] = set()

    def check_room(self) -> None:
        if self.full is not None:
            raise self.full

    def submit(self, requests: Sequence[GenerationRequest], sink: EventSink) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.requests += requests
        for request in requests:
            threading.Thread(target=self._run, args=(request, sink), daemon=True).start()
        self.submitted.set()

    def cancel(self, request_id: str) -> None:
        self._cancelled_ids.add(request_id)
        self.cancelled.set()

    def fold(self, selection: Selection) -> Future[FoldReport]:
        self.folded.append(selection)
        folding: Future[FoldReport] = Future()
        if self.fold_error is not None:
            folding.set_exception(self.fold_error)
        elif not self.fold_never_comes:
            folding.set_result(FoldReport(0.25, "model.layers.0.self_attn.q_proj"))
        return folding

    def stats(self) -> EngineStats:
        return self.stats_now

    def drain(self, timeout_s: float) -> bool:
        self.state = EngineState.DRAINING
        return True

    def stop(self) -> None:
        self.state = EngineState.STOPPED

    def _run(self, request: GenerationRequest, sink: EventSink) -> None:
        sink(self._read(request, sink) if request.task.pools else self._generate(request, sink))

    def _read(self, request: GenerationRequest, sink: EventSink) -> Event:
        """What a text is read as: `pooled`, whatever it is."""
        self.gate.wait(timeout=30)
        if self.failure is not None:
            return FailedEvent(request.request_id, self.failure.code, self.failure.message)
        sink(TokenEvent(request.request_id, 0, (), "", finish_reason=FinishReason.STOP))
        usage, timing = Usage(len(request.prompt_ids), 0), Timing(0.1, 0.2, 0.3)
        return FinishedEvent(request.request_id, usage, timing, request.selection.mode, self.pooled)

    def _generate(self, request: GenerationRequest, sink: EventSink) -> Event:
        """Delivers the tokens; returns the terminal event."""
        if request.params.prompt_logprobs is not None:
            sink(PromptEvent(request.request_id, tuple(_prompt_logprobs(request))))
        text = self.script or fake_text(request.selection.header, request.params.max_new_tokens)
        text = text[: request.params.max_new_tokens]
        _hold(request, self.script)
        ends = FinishReason.STOP if text == self.script else FinishReason.LENGTH
        for choice in range(request.n if not text else 0):
            sink(TokenEvent(request.request_id, choice, (), "", finish_reason=ends))
        for step in range(len(text)):
            if step == self.hold_after:
                self.gate.clear()
            self.gate.wait(timeout=30)
            if self.failure is not None and self.failure.after == step:
                return FailedEvent(request.request_id, self.failure.code, self.failure.message)
            for choice in range(request.n):
                sink(_token(request, choice, text, step, ends))
        usage = Usage(len(request.prompt_ids), len(text) * request.n)
        return FinishedEvent(request.request_id, usage, Timing(0.1, 0.2, 0.3), request.selection.mode)


def fake_text(header: str, tokens: int) -> str:
    """What the FakeEngine answers for a selection with that header."""
    return (f"{header};" * tokens)[:tokens]


def _token(request: GenerationRequest, choice: int, text: str, step: int, ends: FinishReason) -> TokenEvent:
    token, wanted = ord(text[step]), request.params.logprobs
    logprobs = () if wanted is None else (TokenLogprob(token, float("-inf") if step else -0.5, _top(wanted)),)
    reason = ends if step + 1 == len(text) else None
    return TokenEvent(request.request_id, choice, (token,), text[step], logprobs, reason)


def _top(wanted: int) -> tuple[tuple[int, float], ...]:
    return tuple((ord("a") + i, -1.0 - i) for i in range(wanted))


def _prompt_logprobs(request: GenerationRequest) -> Iterator[TokenLogprob | None]:
    yield None
    for token in request.prompt_ids[1:]:
        yield TokenLogprob(token, -float(len(request.prompt_ids)), _top(request.params.prompt_logprobs or 0))


def _hold(request: GenerationRequest, script: str | None) -> None:
    """A script that the request's grammar does not allow would prove nothing."""
    if request.grammar is not None and script is not None:
        guide = request.grammar.start()
        for token in script.encode():
            assert guide.allowed()[token], f"the grammar does not allow {script!r}"
            guide.accept(token)


class FakeMetrics:
    """Remembers what was counted."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.errors: Counter[str] = Counter()
        self.generations: list[tuple[str, str]] = []
        self.finished: Counter[str] = Counter()
        self.observed: Counter[str] = Counter()
        self.usage: Counter[str] = Counter()

    def render(self, reader: str | None) -> tuple[bytes, str]:
        return f"fake_metric 1\n# for {reader}\n".encode(), "text/plain; version=0.0.4; charset=utf-8"

    def observe_request(self, route: str, code: int, seconds: float) -> None:
        assert seconds >= 0
        self.requests[route, code] += 1

    def count_error(self, code: str) -> None:
        self.errors[code] += 1

    def count_usage(self, tenant: str, usage: Usage) -> None:
        self.usage[tenant] += usage.completion_tokens

    def count_generation(self, selection: Selection, tenant: str) -> None:
        self.generations.append((selection.header, tenant))

    def observe_first_token(self, seconds: float) -> None:
        self._observe("first_token", seconds)

    def observe_inter_token(self, seconds: float) -> None:
        self._observe("inter_token", seconds)

    def observe_generation(self, queue_s: float, total_s: float) -> None:
        assert queue_s <= total_s
        self._observe("generation", queue_s)

    def count_finished(self, reason: str, choices: int) -> None:
        self.finished[reason] += choices

    def _observe(self, what: str, seconds: float) -> None:
        assert seconds >= 0
        self.observed[what] += 1
