"""The metrics, as Prometheus's own parser reads them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from adapters.errors import StoreCorrupt
from service.engine.seam import EngineStats
from service.metrics import PrometheusMetrics


class Engine:
    def stats(self) -> EngineStats:
        return EngineStats(1, 2, 3, prompt_tokens=40, completion_tokens=50, folds=6, prefix_tokens=60, prefix_bytes=70)


class Registry:
    def resident_bytes(self) -> tuple[int, int]:
        return 100, 200


class Store:
    broken = False

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


def test_a_scrape_asks_engine_registry_and_store() -> None:
    assert samples(metrics()) == {
        "vblora_queue_depth": 1,
        "vblora_running_sequences": 2,
        "vblora_batch_adapters": 3,
        "vblora_prompt_tokens_total": 40,
        "vblora_completion_tokens_total": 50,
        "vblora_folds_total": 6,
        "vblora_prefix_tokens_total": 60,
        "vblora_prefix_bytes": 70,
        "vblora_adapters": 7,
        "vblora_adapter_resident_bytes{kind=compact}": 100,
        "vblora_adapter_resident_bytes{kind=factors}": 200,
    }


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
    assert not any("errors_total" in name for name in samples(other))


def test_a_broken_store_hides_only_its_own_number() -> None:
    store = Store()
    store.broken = True
    found = samples(metrics(store))
    assert "vblora_adapters" not in found
    assert found["vblora_queue_depth"] == 1
