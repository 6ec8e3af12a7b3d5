"""Every replica's metrics in one text, and their stats in one view."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from service.api.schemas.stats import BatchPart, Latencies, LatencyView, Memory, ServerLimits, StatsView
from service.cluster.metrics import IngressMetrics, merged
from service.cluster.stats import together

REPLICA = """# HELP vblora_folds_total Folds.
# TYPE vblora_folds_total counter
vblora_folds_total 3.0
# HELP vblora_errors_total Errors answered, by code.
# TYPE vblora_errors_total counter
vblora_errors_total{code="overloaded"} 5.0
# HELP vblora_adapter_versions Versions.
# TYPE vblora_adapter_versions gauge
vblora_adapter_versions{state="ready"} 1.0
"""


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_series_say_of_which_replica_they_are() -> None:
    metrics = IngressMetrics()
    metrics.count_error("overloaded")
    text = merged(metrics.render(2)[0], {"0": REPLICA, "1": REPLICA.replace(" 3.0", " 4.0")})
    seen = samples(text)
    assert seen["vblora_folds_total", (("replica", "0"),)] == 3
    assert seen["vblora_folds_total", (("replica", "1"),)] == 4
    assert seen["vblora_adapter_versions", (("replica", "1"), ("state", "ready"))] == 1
    assert seen["vblora_errors_total", (("code", "overloaded"),)] == 1, "what the ingress saw, and nothing twice"
    assert not any("replica" in dict(labels) for name, labels in seen if name == "vblora_errors_total")
    assert seen["vblora_replicas", ()] == 2
    assert text.count("# TYPE vblora_folds_total counter") == 1


def view(**fields: object) -> StatsView:
    latency = LatencyView(count=1, p50=0.1, p95=0.2)
    memory = Memory(
        process_bytes=1, device_bytes=None, weight_bytes=2, kv_bytes=0, kv_budget_bytes=9, prefix_bytes=0,
        adapter_compact_bytes=3, adapter_factor_bytes=4,
    )  # fmt: skip
    known: dict[str, object] = {
        "time": 1.0, "uptime_s": 2.0, "state": "ready", "queue_depth": 1, "running": 2, "distinct_adapters": 1,
        "batch": [BatchPart(selection="sql", rows=2)], "prompt_tokens": 10, "completion_tokens": 20, "cached_tokens": 0,
        "latency": Latencies(first_token_s=latency, inter_token_s=latency, total_s=latency), "memory": memory,
        "limits": ServerLimits(max_batch_size=16, max_queue=256, max_context=512),
    }  # fmt: skip
    return StatsView(**{**known, **fields})  # type: ignore[arg-type]


def test_stats_are_summed() -> None:
    slow = LatencyView(count=3, p50=0.5, p95=None)
    other = view(latency=Latencies(first_token_s=slow, inter_token_s=slow, total_s=slow), state="draining", time=5.0)
    both = together([view(), other])
    assert (both.queue_depth, both.running, both.prompt_tokens, both.completion_tokens) == (2, 4, 20, 40)
    assert both.batch == [BatchPart(selection="sql", rows=4)]
    assert both.latency is not None
    assert both.latency.total_s == LatencyView(count=4, p50=0.5, p95=0.2)
    assert both.memory is not None
    assert (both.memory.weight_bytes, both.memory.device_bytes) == (4, None)
    assert both.limits == ServerLimits(max_batch_size=32, max_queue=512, max_context=512)
    assert (both.state, both.time) == ("ready", 5.0)


def test_what_a_tenant_may_not_see_stays_out() -> None:
    hidden = dict.fromkeys(("queue_depth", "running", "memory", "latency", "prompt_tokens"))
    both = together([view(**hidden), view(**hidden)])
    assert (both.queue_depth, both.memory, both.latency) == (None, None, None)
