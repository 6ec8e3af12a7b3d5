"""Metrics for Prometheus: what the HTTP layer counts, and what engine, registry and store say when they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.errors import StoreError

if TYPE_CHECKING:
    from adapters.registry import AdapterRegistry
    from adapters.store import AdapterStore
    from service.engine.seam import Engine

# From a cached health check to a long generation on a CPU.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class PrometheusMetrics:
    """The metrics of one server, in a registry of their own. Every method may be called from any thread."""

    def __init__(self, engine: Engine, registry: AdapterRegistry, store: AdapterStore) -> None:
        # Else every counter comes with a second series: when it was made.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "vblora_requests", "Responses, by route and HTTP status.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "vblora_request_seconds",
            "From a request's head to the end of its response.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._errors = Counter("vblora_errors", "Errors answered, by code.", ["code"], registry=self._registry)
        self._registry.register(_Server(engine, registry, store))
        ProcessCollector(registry=self._registry)

    def render(self) -> tuple[bytes, str]:
        """The metrics as Prometheus reads them, and their content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def observe_request(self, route: str, code: int, seconds: float) -> None:
        """One response. `route` is the route's template, not a path: paths would make labels without end."""
        self._requests.labels(route, str(code)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_error(self, code: str) -> None:
        """One error answered, by the `code` of its envelope."""
        self._errors.labels(code).inc()


class _Server(Collector):
    """Reads the engine, the registry and the store at every scrape."""

    def __init__(self, engine: Engine, registry: AdapterRegistry, store: AdapterStore) -> None:
        self._engine = engine
        self._registry = registry
        self._store = store

    def collect(self) -> Iterator[Metric]:
        yield from self._of_engine()
        with suppress(StoreError):  # a store in trouble must not hide all else
            yield GaugeMetricFamily("vblora_adapters", "Adapters registered.", self._store.count(""))
        resident = GaugeMetricFamily(
            "vblora_adapter_resident_bytes", "Memory that adapters take, by what is kept of them.", labels=["kind"]
        )
        for kind, size in zip(("compact", "factors"), self._registry.resident_bytes(), strict=True):
            resident.add_metric([kind], size)
        yield resident

    def _of_engine(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield GaugeMetricFamily("vblora_queue_depth", "Sequences accepted that do not run yet.", stats.waiting)
        yield GaugeMetricFamily("vblora_running_sequences", "Sequences in the batch.", stats.running)
        yield GaugeMetricFamily("vblora_batch_adapters", "Distinct adapters in the batch.", stats.distinct_adapters)
        yield CounterMetricFamily("vblora_prompt_tokens", "Prompt tokens run.", stats.prompt_tokens)
        yield CounterMetricFamily("vblora_completion_tokens", "Tokens generated.", stats.completion_tokens)
        yield CounterMetricFamily(
            "vblora_prefix_tokens", "Prompt tokens found in the prefix cache instead.", stats.prefix_tokens
        )
        yield GaugeMetricFamily("vblora_prefix_bytes", "Memory of the prefix cache.", stats.prefix_bytes)
        yield CounterMetricFamily("vblora_folds", "Times a selection was folded into the base weights.", stats.folds)
