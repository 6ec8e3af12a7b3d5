"""Metrics for Prometheus: what the HTTP layer counts, and what engine, registry and store say when they are asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from threading import Lock
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
from adapters.store import SHARED
from service.engine.events import FinishReason
from service.engine.seam import EngineState
from service.engine.selection import BASE

if TYPE_CHECKING:
    from adapters.registry import AdapterRegistry
    from adapters.store import Store
    from service.engine.events import Usage
    from service.engine.seam import Engine
    from service.engine.selection import Selection

# From a cached health check to a long generation on a CPU.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
# From a small model on a GPU to a large one on a CPU, or a pause for somebody else's prompt.
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)

MOST_NAMES = 100  # adapters with a series of their own
BLEND, OTHER = "blend", "other"
FAILED = "failed"  # beside the finish reasons
# Errors to be told of, there from the start: a series that begins at 1 shows no increase.
WATCHED_ERRORS = (
    "internal_error",
    "engine_unavailable",
    "adapter_unavailable",
    "store_unavailable",
    "storage_full",
    "overloaded",
)
SHARED_TENANT = "(shared)"  # as a label: no tenant can be called that, and an empty label is none


class RequestSeries:
    """What is counted of HTTP requests, whoever answers them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "vblora_requests", "Responses, by route and HTTP status.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "vblora_request_seconds",
            "From a request's head to the end of its response.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self._errors = Counter("vblora_errors", "Errors answered, by code.", ["code"], registry=registry)
        for code in WATCHED_ERRORS:
            self._errors.labels(code)

    def observe_request(self, route: str, code: int, seconds: float) -> None:
        """One response. `route` is the route's template, not a path: paths would make labels without end."""
        self._requests.labels(route, str(code)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_error(self, code: str) -> None:
        """One error answered, by the `code` of its envelope."""
        self._errors.labels(code).inc()


class PrometheusMetrics:
    """The metrics of one server, in a registry of their own. Every method may be called from any thread."""

    def __init__(self, engine: Engine, registry: AdapterRegistry, store: Store) -> None:
        # Else every counter comes with a second series: when it was made.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._http = RequestSeries(self._registry)
        self._generations = Counter(
            "vblora_generations", "Generation requests accepted, by adapter.", ["adapter"], registry=self._registry
        )
        self._finished = Counter(
            "vblora_finished_choices", "Choices that ended, by reason.", ["reason"], registry=self._registry
        )
        for reason in (*FinishReason, FAILED):
            self._finished.labels(reason)  # from the start, as the errors above
        self._first_token = self._histogram(
            "vblora_time_to_first_token_seconds", "From a generation request's submission to its first token.", SECONDS
        )
        self._inter_token = self._histogram(
            "vblora_inter_token_latency_seconds", "Between two tokens of one choice.", TOKEN_SECONDS
        )
        self._queued = self._histogram(
            "vblora_queue_seconds", "From a generation request's submission to its first step.", SECONDS
        )
        self._total = self._histogram(
            "vblora_generation_seconds", "From a generation request's submission to its last token.", SECONDS
        )
        self._labels = AdapterLabels(MOST_NAMES)
        self._tenants = CollectorRegistry()
        self._of_tenants = {
            name: Counter(f"vblora_tenant_{name}", help, ["tenant"], registry=self._tenants)
            for name, help in (
                ("generations", "Generation requests that ran to their end or were cancelled, by tenant."),
                ("prompt_tokens", "Prompt tokens of these, cached ones included."),
                ("completion_tokens", "Tokens generated for these."),
            )
        }
        self._registry.register(_Server(engine, registry, store))
        ProcessCollector(registry=self._registry)

    def render(self, reader: str | None = None) -> tuple[bytes, str]:
        """The metrics as Prometheus reads them, and their content type.

        `reader` is the tenant whose key asked: the shared one sees everything, any other its own use alone; None, for
        nobody in particular, all but what tells of tenants.
        """
        if reader is None:
            content = generate_latest(self._registry)
        elif reader == SHARED:
            content = generate_latest(self._registry) + generate_latest(self._tenants)
        else:
            content = generate_latest(_OfTenant(self._tenants, reader))
        return content, CONTENT_TYPE_LATEST

    def observe_request(self, route: str, code: int, seconds: float) -> None:
        self._http.observe_request(route, code, seconds)

    def count_error(self, code: str) -> None:
        self._http.count_error(code)

    def count_generation(self, selection: Selection, tenant: str) -> None:
        """One request that the engine has accepted, by what it runs with."""
        self._generations.labels(self._labels.of(selection, tenant)).inc()

    def count_usage(self, tenant: str, usage: Usage) -> None:
        """One request that has ended without failing, on its tenant's account."""
        counted = {"generations": 1, "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        for name, amount in counted.items():
            self._of_tenants[name].labels(_shown(tenant)).inc(amount)

    def observe_first_token(self, seconds: float) -> None:
        """From a request's submission to its first token."""
        self._first_token.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        """Between two tokens of one choice."""
        self._inter_token.observe(seconds)

    def observe_generation(self, queue_s: float, total_s: float) -> None:
        """A request that ran to its end: what it waited of the time it took."""
        self._queued.observe(queue_s)
        self._total.observe(total_s)

    def count_finished(self, reason: str, choices: int) -> None:
        """Choices that ended: a FinishReason's value, or `failed`."""
        self._finished.labels(reason).inc(choices)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, documentation, buckets=buckets, registry=self._registry)


def _shown(tenant: str) -> str:
    return tenant or SHARED_TENANT


class _OfTenant(Collector):
    """What a registry says of one tenant."""

    def __init__(self, registry: CollectorRegistry, tenant: str) -> None:
        self._registry = registry
        self._tenant = tenant

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if sample.labels.get("tenant") == self._tenant]
            yield metric


class AdapterLabels:
    """Labels for what requests run with: `base`, `blend`, and the names of the first so many adapters seen.

    All others are `other`, so that names make no series without end. So are the adapters of every tenant but the shared
    one: whoever may read the metrics need not be allowed to know that they exist.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._names: set[str] = set()
        self._lock = Lock()

    def of(self, selection: Selection, tenant: str) -> str:
        if selection.is_base:
            return BASE
        if selection.is_blend:
            return BLEND
        name = selection.adapters[0].name
        if tenant or name in (BLEND, OTHER):
            return OTHER
        with self._lock:
            if name not in self._names and len(self._names) < self._most:
                self._names.add(name)
            return name if name in self._names else OTHER


class _Server(Collector):
    """Reads the engine, the registry and the store at every scrape."""

    def __init__(self, engine: Engine, registry: AdapterRegistry, store: Store) -> None:
        self._engine = engine
        self._registry = registry
        self._store = store

    def collect(self) -> Iterator[Metric]:
        yield from self._of_engine()
        yield from self._of_adapters()

    def _of_adapters(self) -> Iterator[Metric]:
        with suppress(StoreError):  # a store in trouble must not hide all else
            yield GaugeMetricFamily("vblora_adapters", "Adapters registered.", self._store.count(""))
        resident = GaugeMetricFamily(
            "vblora_adapter_resident_bytes", "Memory that adapters take, by what is kept of them.", labels=["kind"]
        )
        for kind, size in zip(("compact", "factors"), self._registry.resident_bytes(), strict=True):
            resident.add_metric([kind], size)
        yield resident
        yield from self._of_store()
        stats = self._registry.stats()
        states = GaugeMetricFamily(
            "vblora_adapter_versions",
            "Adapter versions by state, stored ones aside.",
            labels=["state"],
        )
        for state, count in (("loading", stats.loading), ("ready", stats.ready), ("failed", stats.failed)):
            states.add_metric([state], count)
        yield states
        yield CounterMetricFamily("vblora_adapter_hits", "Pins that found an adapter's factors in memory.", stats.hits)
        yield CounterMetricFamily("vblora_adapter_misses", "Pins that did not.", stats.misses)
        yield CounterMetricFamily("vblora_adapter_evictions", "Factors dropped for want of room.", stats.evictions)
        yield CounterMetricFamily("vblora_adapter_composes", "Times factors were composed.", stats.composes)
        yield CounterMetricFamily("vblora_adapter_compose_seconds", "Time spent composing.", stats.compose_s)

    def _of_store(self) -> Iterator[Metric]:
        if (health := self._store.health()) is None:
            return
        yield GaugeMetricFamily(
            "vblora_store_refresh_age_seconds",
            "Since the shared store was last asked for changes, and answered.",
            health.refresh_age_s,
        )
        yield CounterMetricFamily("vblora_store_errors", "Requests that the shared store failed.", health.errors)

    def _of_engine(self) -> Iterator[Metric]:
        stats, now = self._engine.stats(), self._engine.state
        state = GaugeMetricFamily("vblora_engine_state", "1 for the state the engine is in.", labels=["state"])
        for each in EngineState:
            state.add_metric([each.name.lower()], each is now)
        yield state
        yield GaugeMetricFamily("vblora_queue_depth", "Sequences accepted that do not run yet.", stats.waiting)
        yield GaugeMetricFamily("vblora_running_sequences", "Sequences in the batch.", stats.running)
        yield GaugeMetricFamily("vblora_batch_adapters", "Distinct adapters in the batch.", stats.distinct_adapters)
        yield CounterMetricFamily("vblora_prompt_tokens", "Prompt tokens run.", stats.prompt_tokens)
        yield CounterMetricFamily("vblora_completion_tokens", "Tokens generated.", stats.completion_tokens)
        yield CounterMetricFamily(
            "vblora_prefix_tokens", "Prompt tokens found in the prefix cache instead.", stats.prefix_tokens
        )
        yield GaugeMetricFamily("vblora_prefix_bytes", "Memory of the prefix cache.", stats.prefix_bytes)
        yield CounterMetricFamily(
            "vblora_prefix_evicted_blocks", "Blocks dropped from the prefix cache.", stats.prefix_evicted_blocks
        )
        yield GaugeMetricFamily("vblora_kv_bytes", "Keys and values of the sequences that run.", stats.kv_bytes)
        yield GaugeMetricFamily(
            "vblora_kv_budget_bytes", "All the memory for keys and values, prefixes included.", stats.kv_budget_bytes
        )
        yield CounterMetricFamily("vblora_replayed_steps", "Decode steps replayed from graphs.", stats.replayed_steps)
        yield CounterMetricFamily(
            "vblora_eager_steps", "Decode steps that fitted no graph, where there are graphs.", stats.eager_steps
        )
        yield CounterMetricFamily("vblora_folds", "Times a selection was folded into the base weights.", stats.folds)
        yield CounterMetricFamily("vblora_fold_seconds", "Time spent folding.", stats.fold_s)
        yield CounterMetricFamily("vblora_restores", "Times the base weights were restored.", stats.restores)
        yield CounterMetricFamily("vblora_restore_seconds", "Time spent restoring.", stats.restore_s)
