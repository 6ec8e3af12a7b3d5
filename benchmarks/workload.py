"""The requests that every contender answers, and the record of what came back."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from benchmarks.sizes import ModelShape
from service.engine.events import Event, FinishedEvent, TokenEvent
from service.engine.seam import Engine
from service.engine.selection import Selection
from service.engine.sequence import GenerationRequest, SamplingParams

_TIMEOUT_S = 1800.0


class RequestSizes(Protocol):
    """How many requests, and of what lengths: `prompt` and `output` are the least and the most tokens of one."""

    @property
    def model(self) -> ModelShape: ...
    @property
    def requests(self) -> int: ...
    @property
    def prompt(self) -> tuple[int, int]: ...
    @property
    def output(self) -> tuple[int, int]: ...


def make_requests(sizes: RequestSizes, selections: Sequence[Selection], turn: int | str = 0) -> list[GenerationRequest]:
    """Greedy requests dealt to the selections in turn. Their lengths are always the same, their prompts never.

    An engine that remembers prompts would otherwise answer the second turn from memory.
    """
    lengths = random.Random(0)
    return [
        greedy_request(
            f"turn-{turn}-request-{i}",
            random_prompt(lengths.randint(*sizes.prompt), sizes.model.vocabulary, seed=f"{turn}:{i}"),
            lengths.randint(*sizes.output),
            selections[i % len(selections)],
        )
        for i in range(sizes.requests)
    ]


def greedy_request(name: str, prompt: tuple[int, ...], output: int, selection: Selection) -> GenerationRequest:
    params = SamplingParams(max_new_tokens=output, temperature=0.0, ignore_eos=True)
    return GenerationRequest(name, prompt, params, selection)


def random_prompt(length: int, vocabulary: int, seed: int | str) -> tuple[int, ...]:
    draws = random.Random(seed)
    return tuple(draws.randrange(vocabulary) for _ in range(length))


def output_tokens(requests: Sequence[GenerationRequest]) -> int:
    return sum(request.params.max_new_tokens for request in requests)


def on_base(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    return [replace(request, selection=Selection()) for request in requests]


class Recorder:
    """A sink for several requests: their tokens, and when each came."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.times: dict[str, list[float]] = defaultdict(list)
        self._ended: dict[str, Event] = {}
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        with self._changed:
            if isinstance(event, TokenEvent):
                self.tokens[event.request_id] += event.token_ids
                self.times[event.request_id] += [now] * len(event.token_ids)
            else:
                self._ended[event.request_id] = event
            self._changed.notify_all()

    def wait_for_end(self, requests: Sequence[GenerationRequest]) -> None:
        """Until each of these has finished; RuntimeError for one that failed."""
        self._wait(lambda: all(request.request_id in self._ended for request in requests))
        for request in requests:
            if not isinstance(event := self._ended[request.request_id], FinishedEvent):
                raise RuntimeError(f"{request.request_id} failed: {event}")

    def wait_for_tokens(self, requests: Sequence[GenerationRequest], count: int) -> None:
        """Until each of these has `count` more tokens than now; RuntimeError for one that ends before."""
        wanted = {request.request_id: len(self.tokens[request.request_id]) + count for request in requests}
        self._wait(lambda: all(len(self.tokens[name]) >= n or name in self._ended for name, n in wanted.items()))
        if short := [name for name, n in wanted.items() if len(self.tokens[name]) < n]:
            raise RuntimeError(f"{short} ended before the measurement: give them more tokens")

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, _TIMEOUT_S):
                raise TimeoutError(f"no answer within {_TIMEOUT_S:g} s")


def answer(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, list[int]]:
    """Submits all requests at once and waits for the last to finish; their tokens by request."""
    recorder = Recorder()
    for request in requests:
        engine.submit([request], recorder)
    recorder.wait_for_end(requests)
    return {request.request_id: recorder.tokens[request.request_id] for request in requests}
