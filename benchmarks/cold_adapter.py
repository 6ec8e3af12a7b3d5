"""What an adapter that is only on disk costs: its own first token, and the rows that run meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from statistics import median
from typing import Any

from benchmarks.sizes import EngineSizes
from benchmarks.stage import Stage, running_engine, selections
from benchmarks.workload import Recorder, greedy_request, random_prompt
from service.engine.seam import Engine
from service.engine.selection import Selection

_QUIET_TOKENS = 4  # that running rows get between two probes
_numbers = count()


@dataclass(frozen=True, slots=True)
class Span:
    """Of time: from a request's submission to its first token, or between two tokens of a row."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def overlaps(self, other: Span) -> bool:
        return self.start < other.end and other.start < self.end


@dataclass(frozen=True, slots=True)
class Probe:
    """One adapter asked for twice: when nothing of it was in memory, and again at once."""

    cold: Span
    warm: Span


def measure_cold_adapter(stage: Stage, sizes: EngineSizes, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Probes half of the adapters, once on an idle engine and once while rows with the other half run."""
    chosen = selections(stage, names)
    resident, cold = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    idle: list[Probe] = []
    busy: list[Probe] = []
    gaps: list[Span] = []
    for _ in range(rounds):
        with running_engine(stage, stage.registry(), sizes.rows) as engine:  # a new registry: all is cold again
            probe(engine, sizes, resident[0])
            idle += [probe(engine, sizes, selection) for selection in cold]
        with running_engine(stage, stage.registry(), sizes.rows) as engine:
            rows = RunningRows(engine, sizes, resident)
            for selection in cold:
                rows.take_tokens(_QUIET_TOKENS)
                busy.append(probe(engine, sizes, selection))
            gaps += rows.stop()
    middle = median(gap.seconds for gap in gaps)
    loading = [gap.seconds for gap in gaps if any(gap.overlaps(one.cold) for one in busy)]
    joining = [gap.seconds for gap in gaps if any(gap.overlaps(one.warm) for one in busy)]
    return {
        "probes": len(busy),
        "probe_prompt_tokens": sizes.probe_prompt,
        "first_token_idle": _first_tokens(idle),
        "first_token_busy": _first_tokens(busy),
        "running_rows": sizes.running_rows,
        "median_gap_ms": 1000 * middle,
        "longest_gap_cold_ms": 1000 * max(loading),
        "longest_gap_warm_ms": 1000 * max(joining),
        "longest_gap_cold_over_median": max(loading) / middle,
        "longest_gap_cold_over_warm": max(loading) / max(joining),
    }


def probe(engine: Engine, sizes: EngineSizes, selection: Selection) -> Probe:
    return Probe(first_token(engine, sizes, selection), first_token(engine, sizes, selection))


def first_token(engine: Engine, sizes: EngineSizes, selection: Selection) -> Span:
    """Runs a request of one token."""
    name = f"probe-{next(_numbers)}"
    prompt = random_prompt(sizes.probe_prompt, sizes.model.vocabulary, seed=name)  # none is known from before
    request = greedy_request(name, prompt, 1, selection)
    recorder = Recorder()
    start = time.perf_counter()
    engine.submit([request], recorder)
    recorder.wait_for_end([request])
    return Span(start, recorder.times[request.request_id][0])


class RunningRows:
    """Requests that decode until they are told to stop."""

    def __init__(self, engine: Engine, sizes: EngineSizes, among: Sequence[Selection]) -> None:
        self._engine = engine
        self._recorder = Recorder()
        output = sizes.model.context - sizes.probe_prompt
        self._requests = []
        for row in range(sizes.running_rows):
            name = f"running-{row}"
            prompt = random_prompt(sizes.probe_prompt, sizes.model.vocabulary, seed=name)
            self._requests.append(greedy_request(name, prompt, output, among[row % len(among)]))
        for request in self._requests:
            engine.submit([request], self._recorder)
        self.take_tokens(1)

    def take_tokens(self, count: int) -> None:
        self._recorder.wait_for_tokens(self._requests, count)

    def stop(self) -> list[Span]:
        """Cancels the rows; the gaps between the tokens of each."""
        self.take_tokens(_QUIET_TOKENS)
        for request in self._requests:
            self._engine.cancel(request.request_id)
        self._recorder.wait_for_end(self._requests)
        return [Span(*pair) for times in self._recorder.times.values() for pair in pairwise(times)]


def _first_tokens(probes: Sequence[Probe]) -> dict[str, float]:
    return {
        "cold_ms": 1000 * median(one.cold.seconds for one in probes),
        "warm_ms": 1000 * median(one.warm.seconds for one in probes),
        "cold_over_warm": median(one.cold.seconds / one.warm.seconds for one in probes),
    }
