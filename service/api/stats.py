"""One moment of the server, as a tenant may see it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from adapters.store import SHARED
from service.api.activity import Activity, LatencyWindow
from service.api.deps import ServerState
from service.api.schemas.stats import BatchPart, Latencies, LatencyView, Memory, ServerLimits, StatsView
from service.engine.memory import device_bytes, process_bytes
from service.engine.seam import BatchShare, EngineStats


def show_stats(state: ServerState, tenant: str) -> StatsView:
    """Reads no files and waits for no step: it may be asked for every second."""
    engine, stats = state.engine, state.engine.stats()
    sees_all = tenant == SHARED or state.settings.metrics_public
    return StatsView(
        time=time.time(),
        uptime_s=state.activity.uptime_s,
        state=engine.state.name.lower(),
        queue_depth=stats.waiting if sees_all else None,
        running=stats.running if sees_all else None,
        distinct_adapters=stats.distinct_adapters if sees_all else None,
        batch=_batch(stats.batch, tenant, with_others=sees_all),
        prompt_tokens=stats.prompt_tokens + stats.prefix_tokens if sees_all else None,
        completion_tokens=stats.completion_tokens if sees_all else None,
        cached_tokens=stats.prefix_tokens if sees_all else None,
        latency=_latencies(state.activity) if sees_all else None,
        memory=_memory(state, stats) if sees_all else None,
        limits=ServerLimits(
            max_batch_size=engine.max_batch_size, max_queue=engine.max_queue, max_context=engine.max_context
        ),
    )


def _batch(shares: Iterable[BatchShare], tenant: str, *, with_others: bool) -> list[BatchPart]:
    """A tenant's own rows by what they run. Of others', whoever asks, only how many there are."""
    rows: Counter[str | None] = Counter()
    for share in shares:
        if share.tenant == tenant:
            rows[share.selection.names] += share.rows
        elif with_others:
            rows[None] += share.rows
    return [BatchPart(selection=selection, rows=count) for selection, count in rows.most_common()]


def _latencies(activity: Activity) -> Latencies:
    return Latencies(
        first_token_s=_latency(activity.first_token),
        inter_token_s=_latency(activity.inter_token),
        total_s=_latency(activity.total),
    )


def _latency(window: LatencyWindow) -> LatencyView:
    summary = window.summary()
    return LatencyView(count=summary.count, p50=summary.p50, p95=summary.p95)


def _memory(state: ServerState, stats: EngineStats) -> Memory:
    compact, factors = state.registry.resident_bytes()
    return Memory(
        process_bytes=process_bytes(),
        device_bytes=device_bytes(state.base.device),
        weight_bytes=state.base.weight_bytes,
        kv_bytes=stats.kv_bytes,
        kv_budget_bytes=stats.kv_budget_bytes,
        prefix_bytes=stats.prefix_bytes,
        adapter_compact_bytes=compact,
        adapter_factor_bytes=factors,
    )
