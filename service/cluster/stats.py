"""One moment of several replicas as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from service.api.schemas.stats import BatchPart, Latencies, LatencyView, Memory, ServerLimits, StatsView

_BEST_FIRST = ("ready", "draining", "stopped", "dead")
_SUMMED = ("queue_depth", "running", "distinct_adapters", "prompt_tokens", "completion_tokens", "cached_tokens")


def together(views: Sequence[StatsView]) -> StatsView:
    """Counts are summed, and so an adapter counts on each replica that runs it; of a percentile, the slowest
    replica's stands for all.
    """
    rows: Counter[str | None] = Counter()
    for view in views:
        for part in view.batch:
            rows[part.selection] += part.rows
    first = views[0]
    summed: dict[str, Any] = {name: _sum(getattr(view, name) for view in views) for name in _SUMMED}
    return StatsView(
        time=max(view.time for view in views),
        uptime_s=max(view.uptime_s for view in views),
        state=min((view.state for view in views), key=_BEST_FIRST.index),
        batch=[BatchPart(selection=selection, rows=count) for selection, count in rows.most_common()],
        latency=None if first.latency is None else _latencies([view.latency for view in views if view.latency]),
        memory=None if first.memory is None else _memory([view.memory for view in views if view.memory]),
        limits=ServerLimits(
            max_batch_size=sum(view.limits.max_batch_size for view in views),
            max_queue=sum(view.limits.max_queue for view in views),
            max_context=min(view.limits.max_context for view in views),
        ),
        **summed,
    )


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _latencies(views: Sequence[Latencies]) -> Latencies:
    return Latencies(**{name: _slowest([getattr(view, name) for view in views]) for name in Latencies.model_fields})


def _slowest(views: Sequence[LatencyView]) -> LatencyView:
    return LatencyView(
        count=sum(view.count for view in views),
        p50=max((view.p50 for view in views if view.p50 is not None), default=None),
        p95=max((view.p95 for view in views if view.p95 is not None), default=None),
    )


def _memory(views: Sequence[Memory]) -> Memory:
    summed: dict[str, Any] = {name: _sum(getattr(view, name) for view in views) for name in Memory.model_fields}
    return Memory(**summed)
