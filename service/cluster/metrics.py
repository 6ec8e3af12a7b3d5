"""The ingress's own metrics, and those of all replicas beside them, each series with the replica that it is of."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from service.cluster.routing import COUNTS, Routed
from service.metrics import RequestSeries

# Counted by the ingress, which sees every request once.
_NOT_OF_REPLICAS = re.compile(r"vblora_(requests|request_seconds|errors)(_total|_bucket|_count|_sum)?")
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+.*)")


class IngressMetrics:
    """In a registry of their own. Every method may be called from any thread."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._http = RequestSeries(self._registry)
        self._replicas = Gauge("vblora_replicas", "Replicas that requests can go to.", registry=self._registry)
        self._lost = Counter(
            "vblora_replicas_lost", "Replicas that ended while they answered a request.", registry=self._registry
        )
        self._routed = Counter(
            "vblora_routed",
            "Requests given to a replica: to the one that their adapters chose (home), to another because that was "
            "full (spilled), to any because they had no adapters (any); and those refused because all were full.",
            ["to"],
            registry=self._registry,
        )
        for each in Routed:
            self._routed.labels(each)
        self._told: dict[Routed, int] = dict.fromkeys(Routed, 0)
        ProcessCollector(registry=self._registry)

    def render(self, replicas: int) -> tuple[str, str]:
        """(the text, its content type)."""
        self._replicas.set(replicas)
        for each in Routed:
            count = COUNTS[each]
            self._routed.labels(each).inc(count - self._told[each])
            self._told[each] = count
        return generate_latest(self._registry).decode(), CONTENT_TYPE_LATEST

    def observe_request(self, route: str, code: int, seconds: float) -> None:
        self._http.observe_request(route, code, seconds)

    def count_error(self, code: str) -> None:
        self._http.count_error(code)

    def count_lost(self) -> None:
        self._lost.inc()


def merged(own: str, of_replicas: Mapping[str, str]) -> str:
    """Prometheus' text format: every family once, with the series of all."""
    families: dict[str, list[str]] = {}
    comments: dict[str, list[str]] = {}
    for replica, text in (("", own), *sorted(of_replicas.items())):
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                if (kept := comments.setdefault(family, [])) is not None and line not in kept:
                    kept.append(line)
            elif line:
                families.setdefault(family, []).append(line if not replica else _labelled(line, replica))
    lines = [
        line for family, comment in comments.items() for line in (*comment, *filter(None, families.get(family, ())))
    ]
    return "\n".join([*lines, ""])


def _labelled(sample: str, replica: str) -> str:
    """The sample with a label more; nothing if it is not the replica's to tell."""
    match = _SAMPLE.fullmatch(sample)
    assert match is not None, sample
    name, labels, value = match.groups()
    if _NOT_OF_REPLICAS.fullmatch(name):
        return ""
    both = ",".join(filter(None, (labels, f'replica="{replica}"')))
    return f"{name}{{{both}}} {value}"
