"""The metrics, as Prometheus's own parser reads them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapters.errors import StoreCorrupt
from adapters.status import RegistryStats
from adapters.store.seam import StoreHealth
from service.api.errors import STATUS
from service.engine.events import Usage
from service.engine.seam import EngineState, EngineStats
from service.engine.selection import Mode, SelectedAdapter, Selection
from service.metrics import MOST_NAMES, WATCHED_ERRORS, PrometheusMetrics


class Engine:
    state = EngineState.DRAINING

    def stats(self) -> EngineStats:
        return EngineStats(
            1, 2, 3, prompt_tokens=40, completion_tokens=50, folds=6, prefix_tokens=60, prefix_bytes=70,
            prefix_evicted_blocks=80, fold_s=9.5, restores=10, restore_s=11.5, kv_bytes=120, kv_budget_bytes=130,
            replayed_steps=140, eager_steps=150,
        )  # fmt: skip


class Registry:
    def resident_bytes(self) -> tuple[int, int]:
        return 100, 200

    def stats(self) -> RegistryStats:
        return RegistryStats(1, 2, 3, 4, compose_s=5.5, loading=6, ready=7, failed=8)


class Store:
    broken = False

    def health(self) -> StoreHealth | None:
        return StoreHealth(1.5, 9)

    def count(self, tenant: str) -> int:
        if self.broken:
            raise StoreCorrupt("damaged")
        assert tenant == ""
        return 7


def metrics(store: Store | None = None) -> PrometheusMetrics:
    return PrometheusMetrics(Engine(), Registry(), store or Store())  # type: ignore[arg-type]


def samples(metrics: PrometheusMetrics) -> dict[str, float]:
    """`name{label=value}` → value, of our own metrics."""
    text = metrics.render()[0].decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return {name: value for name, value in found.items() if name.startswith("vblora_")}


def changed(server: PrometheusMetrics, change: Callable[[], None]) -> dict[str, float]:
    """By how much each sample went up, of those that did; sums and buckets of histograms aside."""
    before = samples(server)
    change()
    after = samples(server)
    moved = {name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name, 0.0)}
    return {name: value for name, value in moved.items() if "_bucket" not in name and not name.endswith("_sum")}


def one(name: str, weight: float = 1.0) -> Selection:
    return Selection((SelectedAdapter(name, f"sha256:{name}", weight),))


def test_a_scrape_asks_engine_registry_and_store() -> None:
    found = samples(metrics())
    at_rest = ("vblora_finished_choices", "vblora_errors", "_seconds_bucket", "_seconds_count", "_seconds_sum")
    assert {name: value for name, value in found.items() if value or not any(part in name for part in at_rest)} == {
        "vblora_engine_state{state=ready}": 0,
        "vblora_engine_state{state=draining}": 1,
        "vblora_engine_state{state=stopped}": 0,
        "vblora_engine_state{state=dead}": 0,
        "vblora_queue_depth": 1,
        "vblora_running_sequences": 2,
        "vblora_batch_adapters": 3,
        "vblora_prompt_tokens_total": 40,
        "vblora_completion_tokens_total": 50,
        "vblora_folds_total": 6,
        "vblora_prefix_tokens_total": 60,
        "vblora_prefix_bytes": 70,
        "vblora_prefix_evicted_blocks_total": 80,
        "vblora_fold_seconds_total": 9.5,
        "vblora_restores_total": 10,
        "vblora_restore_seconds_total": 11.5,
        "vblora_kv_bytes": 120,
        "vblora_kv_budget_bytes": 130,
        "vblora_replayed_steps_total": 140,
        "vblora_eager_steps_total": 150,
        "vblora_adapters": 7,
        "vblora_store_refresh_age_seconds": 1.5,
        "vblora_store_errors_total": 9,
        "vblora_adapter_resident_bytes{kind=compact}": 100,
        "vblora_adapter_resident_bytes{kind=factors}": 200,
        "vblora_adapter_hits_total": 1,
        "vblora_adapter_misses_total": 2,
        "vblora_adapter_evictions_total": 3,
        "vblora_adapter_composes_total": 4,
        "vblora_adapter_compose_seconds_total": 5.5,
        "vblora_adapter_versions{state=loading}": 6,
        "vblora_adapter_versions{state=ready}": 7,
        "vblora_adapter_versions{state=failed}": 8,
    }


def test_every_observation_moves_its_own_metric_and_no_other() -> None:
    server = metrics()
    assert changed(server, lambda: None) == {}
    assert changed(server, lambda: server.observe_first_token(0.2)) == {"vblora_time_to_first_token_seconds_count": 1}
    assert changed(server, lambda: server.observe_inter_token(0.2)) == {"vblora_inter_token_latency_seconds_count": 1}
    assert changed(server, lambda: server.observe_generation(0.1, 7)) == {
        "vblora_queue_seconds_count": 1,
        "vblora_generation_seconds_count": 1,
    }
    assert changed(server, lambda: server.count_finished("stop", 3)) == {
        "vblora_finished_choices_total{reason=stop}": 3
    }
    assert changed(server, lambda: server.count_generation(Selection(), "")) == {
        "vblora_generations_total{adapter=base}": 1
    }


def test_times_are_in_seconds() -> None:
    server = metrics()
    server.observe_first_token(0.3)
    server.observe_inter_token(0.004)
    server.observe_generation(0.02, 7)
    found = samples(server)
    assert found["vblora_time_to_first_token_seconds_sum"] == 0.3
    assert found["vblora_inter_token_latency_seconds_bucket{le=0.0025}"] == 0
    assert found["vblora_inter_token_latency_seconds_bucket{le=0.005}"] == 1
    assert (found["vblora_queue_seconds_sum"], found["vblora_generation_seconds_sum"]) == (0.02, 7)


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled", "failed"])
def test_every_reason_is_there_before_it_happens(reason: str) -> None:
    assert samples(metrics())[f"vblora_finished_choices_total{{reason={reason}}}"] == 0


@pytest.mark.parametrize(
    ("selection", "tenant", "label"),
    [
        (Selection(), "", "base"),
        (Selection(), "acme", "base"),
        (one("sql"), "", "sql"),
        (Selection(one("sql").adapters, Mode.MERGE), "", "sql"),
        (one("sql", 0.5), "", "blend"),
        (Selection(one("sql").adapters + one("style").adapters), "", "blend"),
        (one("secret"), "acme", "other"),
        (Selection(one("secret").adapters + one("sql").adapters), "acme", "blend"),
        (one("blend"), "", "other"),
        (one("other"), "", "other"),
    ],
)
def test_what_a_request_ran_with_is_its_label(selection: Selection, tenant: str, label: str) -> None:
    server = metrics()
    moved = changed(server, lambda: server.count_generation(selection, tenant))
    assert moved == {f"vblora_generations_total{{adapter={label}}}": 1}


def test_use_is_shown_to_its_own_tenant_and_to_the_shared_one() -> None:
    server = metrics()
    for tenant, tokens in (("acme", 5), ("rival", 7), ("", 11)):
        server.count_usage(tenant, Usage(tokens, 1))
        server.count_generation(one("secret"), tenant or "acme")

    def seen(reader: str | None) -> str:
        return server.render(reader)[0].decode()

    for reader, other in (("acme", "rival"), ("rival", "acme")):
        lines = [line for line in seen(reader).splitlines() if not line.startswith("#")]
        assert len(lines) == 3
        assert all(f'{{tenant="{reader}"}}' in line for line in lines)
        assert other not in seen(reader)
    assert 'vblora_tenant_prompt_tokens_total{tenant="rival"} 7.0' in seen("")
    assert 'vblora_tenant_prompt_tokens_total{tenant="(shared)"} 11.0' in seen("")
    assert "vblora_queue_depth" in seen("")
    assert "vblora_tenant" not in seen(None)
    assert "secret" not in seen(None) + seen("") + seen("acme")
    assert not [line for line in seen("nobody").splitlines() if not line.startswith("#")]


def test_ten_thousand_names_make_a_bounded_number_of_series() -> None:
    server = metrics()
    for i in range(10_000):
        server.count_generation(one(f"adapter-{i}"), "")
    server.count_generation(one("adapter-0"), "")
    found = {name: value for name, value in samples(server).items() if name.startswith("vblora_generations_total")}
    assert len(found) == MOST_NAMES + 1
    assert found["vblora_generations_total{adapter=adapter-0}"] == 2
    assert found["vblora_generations_total{adapter=other}"] == 10_000 - MOST_NAMES


@pytest.mark.parametrize("code", WATCHED_ERRORS)
def test_errors_to_be_told_of_are_there_before_they_happen(code: str) -> None:
    assert code in STATUS
    assert samples(metrics())[f"vblora_errors_total{{code={code}}}"] == 0


def test_requests_and_errors_are_counted() -> None:
    server = metrics()
    server.observe_request("/v1/generate", 200, 0.3)
    server.observe_request("/v1/generate", 429, 0.001)
    server.count_error("overloaded")
    found = samples(server)
    assert found["vblora_requests_total{route=/v1/generate,status=200}"] == 1
    assert found["vblora_requests_total{route=/v1/generate,status=429}"] == 1
    assert found["vblora_errors_total{code=overloaded}"] == 1
    assert found["vblora_request_seconds_count{route=/v1/generate}"] == 2
    assert found["vblora_request_seconds_bucket{le=0.25,route=/v1/generate}"] == 1
    assert not any("_created" in name for name in found)


def test_content_type_is_prometheus_text() -> None:
    assert metrics().render()[1].startswith("text/plain; version=")


def test_servers_do_not_share_counters() -> None:
    one, other = metrics(), metrics()
    one.count_error("overloaded")
    assert samples(one)["vblora_errors_total{code=overloaded}"] == 1
    assert samples(other)["vblora_errors_total{code=overloaded}"] == 0


def test_a_broken_store_hides_only_its_own_number() -> None:
    store = Store()
    store.broken = True
    found = samples(metrics(store))
    assert "vblora_adapters" not in found
    assert found["vblora_queue_depth"] == 1
