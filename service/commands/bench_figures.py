"""What outcomes come to: counts, rates and latencies, of all of them and of each adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from service.commands.bench_client import Ending, Outcome
from service.commands.bench_loops import Record


def quantile(values: Iterable[float], share: float) -> float | None:
    """The value below which that share of them lies; None of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds; None where nothing was measured."""

    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Latency:
        values = [round(1000 * value, 3) for value in seconds]
        shares = [quantile(values, share) for share in (0.5, 0.95, 0.99)]
        return cls(round(fmean(values), 3) if values else None, *shares)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of some requests. `by_code` counts those that were not answered; tokens and latencies are of those that were."""

    ok: int
    failed: int
    refused: int
    retries: int
    by_code: dict[str, int]
    input_tokens: int
    output_tokens: int
    first_token_ms: Latency
    inter_token_ms: Latency
    end_to_end_ms: Latency

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Figures:
        endings = Counter(outcome.ending for outcome in outcomes)
        answered = [(outcome, outcome.answer) for outcome in outcomes if outcome.answer is not None]
        return cls(
            ok=endings[Ending.OK],
            failed=endings[Ending.FAILED],
            refused=endings[Ending.REFUSED],
            retries=sum(outcome.retries for outcome in outcomes),
            by_code=dict(Counter(outcome.code for outcome in outcomes if outcome.code is not None)),
            input_tokens=sum(answer.input_tokens for _, answer in answered),
            output_tokens=sum(answer.output_tokens for _, answer in answered),
            first_token_ms=Latency.of(answer.times[0] - each.asked for each, answer in answered if answer.times),
            inter_token_ms=Latency.of(b - a for _, answer in answered for a, b in pairwise(answer.times)),
            end_to_end_ms=Latency.of(each.ended - each.asked for each, _ in answered),
        )


@dataclass(frozen=True, slots=True)
class Results:
    """A whole measurement. `adapters` are in the order in which they were first asked for."""

    unfinished: int
    duration_s: float
    total: Figures
    adapters: dict[str, Figures]
    messages: dict[str, str]

    @classmethod
    def of(cls, record: Record) -> Results:
        """From the first request to the end of the last. `messages` has an error's text for each code."""
        outcomes = record.outcomes
        by_adapter: dict[str, list[Outcome]] = {}
        for outcome in sorted(outcomes, key=lambda outcome: outcome.asked):
            by_adapter.setdefault(outcome.ask.adapter, []).append(outcome)
        return cls(
            unfinished=record.unfinished,
            duration_s=max(each.ended for each in outcomes) - min(each.asked for each in outcomes),
            total=Figures.of(outcomes),
            adapters={name: Figures.of(each) for name, each in by_adapter.items()},
            messages={each.code: each.message for each in reversed(outcomes) if each.code is not None},
        )

    @property
    def all_answered(self) -> bool:
        return self.total.ok > 0 and not (self.total.failed or self.total.refused or self.unfinished)

    def per_second(self, count: int) -> float:
        return round(count / self.duration_s, 3)

    def to_dict(self) -> dict[str, Any]:
        total = self.total
        return {
            **asdict(total),
            "unfinished": self.unfinished,
            "duration_s": round(self.duration_s, 4),
            "requests_per_s": self.per_second(total.ok),
            "output_tokens_per_s": self.per_second(total.output_tokens),
            "input_tokens_per_s": self.per_second(total.input_tokens),
            "adapters": {name: asdict(figures) for name, figures in self.adapters.items()},
        }
