"""One moment of the server, requests by adapter, and who asks: for whom they are, and for whom not."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from service.api.keys import ApiKey, Scope
from service.engine.errors import Overloaded
from service.engine.seam import BatchShare, EngineState, EngineStats
from service.engine.selection import SelectedAdapter, Selection
from service.engine.task import Task
from tests.api.conftest import Server, error_of
from tests.api.test_tenancy import KEYS, Client

EVERYBODYS = (
    "queue_depth", "running", "distinct_adapters", "prompt_tokens", "completion_tokens", "cached_tokens", "latency",
    "memory",
)  # fmt: skip
ANYONES = {"time", "uptime_s", "state", "batch", "limits"}
NOTHING = {"count": 0, "p50": None, "p95": None}


def selection(**weights: float) -> Selection:
    return Selection(tuple(SelectedAdapter(name, f"sha256:{name}", weight) for name, weight in weights.items()))


NOW = EngineStats(
    waiting=3,
    running=12,
    distinct_adapters=4,
    prompt_tokens=1000,
    completion_tokens=200,
    folds=0,
    prefix_tokens=50,
    prefix_bytes=7,
    kv_bytes=5,
    kv_budget_bytes=9,
    batch=(
        BatchShare("acme", selection(secret=1.0), 3),
        BatchShare("", selection(shout=0.7, dashes=0.3), 1),
        BatchShare("rival", selection(hidden=1.0), 4),
        BatchShare("", Selection(), 2),
        BatchShare("acme", Selection(), 2),
    ),
)


def shown(stats: Any) -> list[tuple[str | None, int]]:
    return [(part["selection"], part["rows"]) for part in stats["batch"]]


@pytest.fixture
def tenants(make_server: Callable[..., Server]) -> Callable[..., Server]:
    def make(*, metrics_public: bool) -> Server:
        server = make_server(KEYS, metrics_public=metrics_public)
        server.engine.stats_now = NOW
        return server

    return make


# --- stats ----------------------------------------------------------------------------------------


def test_one_moment_of_the_server(server: Server) -> None:
    server.engine.stats_now = replace(NOW, batch=(*NOW.batch[1:2], replace(NOW.batch[0], tenant="")))
    stats = server.client.get("/v1/stats").json()
    assert set(stats) == {*EVERYBODYS, *ANYONES}
    assert abs(stats["time"] - time.time()) < 60
    assert stats["uptime_s"] >= 0
    assert stats["state"] == "ready"
    assert (stats["queue_depth"], stats["running"], stats["distinct_adapters"]) == (3, 12, 4)
    assert shown(stats) == [("secret", 3), ("shout:0.7+dashes:0.3", 1)], "the most rows first"
    assert (stats["prompt_tokens"], stats["completion_tokens"], stats["cached_tokens"]) == (1050, 200, 50)
    assert stats["latency"] == {"first_token_s": NOTHING, "inter_token_s": NOTHING, "total_s": NOTHING}
    assert stats["limits"] == {"max_batch_size": 16, "max_queue": 64, "max_context": 256}
    memory = stats["memory"]
    assert memory.pop("process_bytes") > 1 << 20
    assert memory == {
        "device_bytes": None,
        "weight_bytes": 49380,
        "kv_bytes": 5,
        "kv_budget_bytes": 9,
        "prefix_bytes": 7,
        "adapter_compact_bytes": 0,
        "adapter_factor_bytes": 0,
    }


def test_adapters_in_memory_count(server: Server) -> None:
    server.upload("sql")
    memory = server.client.get("/v1/stats").json()["memory"]
    assert memory["adapter_compact_bytes"] == server.client.get("/v1/adapters/sql").json()["resident_bytes"] > 0
    server.registry.pin(server.digest("sql"))
    assert server.client.get("/v1/stats").json()["memory"]["adapter_factor_bytes"] > 0


@pytest.mark.parametrize("state", EngineState)
def test_it_says_whether_the_server_takes_requests(server: Server, state: EngineState) -> None:
    server.engine.state = state
    assert server.client.get("/v1/stats").json()["state"] == state.name.lower()


def test_what_was_generated_is_in_the_latencies(server: Server) -> None:
    for _ in range(2):
        assert server.generate(max_new_tokens=5, n=2).status_code == 200
    latency = server.client.get("/v1/stats").json()["latency"]
    assert [latency[what]["count"] for what in ("first_token_s", "inter_token_s", "total_s")] == [2, 2 * 2 * 4, 2]
    assert latency["total_s"] == {"count": 2, "p50": 0.3, "p95": 0.3}, "what the engine says"
    assert 0 <= latency["first_token_s"]["p50"] <= latency["first_token_s"]["p95"] < 60


@pytest.mark.parametrize("public", [True, False])
def test_others_rows_have_no_name(tenants: Callable[..., Server], public: bool) -> None:
    server = tenants(metrics_public=public)
    acme, rival, operator = (Client(server, key) for key in ("acme", "rival", "operator"))
    own = {acme: [("secret", 3), ("base", 2)], rival: [("hidden", 4)]}
    for client, rows in own.items():
        stats = client.ask("GET", "/v1/stats").json()
        assert set(stats) == {*EVERYBODYS, *ANYONES}
        others = 12 - sum(count for _, count in rows)
        assert shown(stats) == ([(None, others), *rows] if public else rows)
        assert [key for key in EVERYBODYS if stats[key] is None] == ([] if public else list(EVERYBODYS))
        assert stats["limits"]["max_queue"] == 64
    answer = operator.ask("GET", "/v1/stats")
    assert shown(answer.json()) == [(None, 9), ("base", 2), ("shout:0.7+dashes:0.3", 1)]
    assert None not in [answer.json()[key] for key in EVERYBODYS]
    for client, foreign in ((operator, ("secret", "hidden")), (acme, ("hidden", "shout")), (rival, ("secret",))):
        text = client.ask("GET", "/v1/stats").text
        assert not any(name in text for name in (*foreign, "acme", "rival"))


def test_no_key_no_stats(tenants: Callable[..., Server]) -> None:
    for public in (True, False):
        server = tenants(metrics_public=public)
        error_of(server.client.get("/v1/stats"), 401, "unauthorized")
    for key in ("acme-infer", "acme-admin"):
        assert Client(server, key).ask("GET", "/v1/stats").status_code == 200, "with any key"


# --- requests by adapter --------------------------------------------------------------------------


def requests(client: Any, name: str) -> Any:
    listed = {adapter["name"]: adapter["requests"] for adapter in client.ask("GET", "/v1/adapters").json()["data"]}
    single = client.ask("GET", f"/v1/adapters/{name}").json()["requests"]
    assert single == listed[name]
    return single


def test_requests_are_counted_by_adapter_and_for_their_own_tenant(tenants: Callable[..., Server]) -> None:
    server = tenants(metrics_public=False)
    acme, rival, operator = (Client(server, key) for key in ("acme", "rival", "operator"))
    assert operator.upload("common").json()["requests"] == 0
    acme.upload("mine", "two")
    acme.upload("other", "logits")
    assert acme.generate(adapter="common").status_code == 200
    assert acme.generate(adapters=[{"name": "common", "weight": 0.5}, {"name": "mine", "weight": 2}]).status_code == 200
    assert rival.generate(adapter="common").status_code == 200
    assert rival.generate().status_code == 200
    assert [requests(client, "common") for client in (acme, rival, operator)] == [2, 1, 3]
    assert (requests(acme, "mine"), requests(acme, "other")) == (1, 0)
    assert acme.ask("POST", "/v1/adapters/mine/activate").json()["requests"] == 1
    acme.generate()
    assert requests(acme, "mine") == 2, "what runs with it as the default"


def test_an_own_adapter_of_a_shared_ones_name_has_its_own_count(tenants: Callable[..., Server]) -> None:
    server = tenants(metrics_public=False)
    acme, operator = Client(server, "acme"), Client(server, "operator")
    operator.upload("sql", "one")
    acme.upload("sql", "one")
    for _ in range(3):
        acme.generate(adapter="sql")
    assert (requests(acme, "sql"), requests(operator, "sql")) == (3, 0), "the same files under the same name"
    acme.ask("DELETE", "/v1/adapters/sql")
    assert requests(acme, "sql") == 0, "the shared one"


def test_refused_requests_do_not_count(server: Server) -> None:
    server.upload("sql")
    server.engine.refusal = Overloaded("full", retry_after_s=1)
    error_of(server.generate(adapter="sql"), 429, "overloaded")
    server.engine.refusal = None
    assert server.client.get("/v1/adapters/sql").json()["requests"] == 0


@pytest.mark.parametrize("unload", [True, False])
def test_a_count_outlives_versions_and_ends_with_the_adapter(server: Server, unload: bool) -> None:
    server.upload("sql")
    server.generate(adapter="sql")
    assert server.upload("sql", "two", "?replace=true").json()["requests"] == 1
    if unload:
        response = server.client.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
    else:
        response = server.client.delete("/v1/adapters/sql")
    assert response.is_success
    assert server.upload("sql").json()["requests"] == 0


def test_an_adapter_says_what_plain_lora_would_take(server: Server) -> None:
    view = server.upload("sql").json()
    assert view["lora_params"] == server.client.get("/v1/adapters/sql/parameters").json()["lora_params"]


# --- who asks -------------------------------------------------------------------------------------


def test_who_asks_and_what_is_allowed(tenants: Callable[..., Server]) -> None:
    server = tenants(metrics_public=False)
    both = ["infer", "admin"]
    expected = {"acme": ("acme", both), "acme-infer": ("acme", ["infer"]), "acme-admin": ("acme", ["admin"])}
    expected |= {"operator": ("", both)}
    for key, (tenant, scopes) in expected.items():
        identity = Client(server, key).ask("GET", "/v1/whoami").json()
        assert identity == {"tenant": tenant, "scopes": scopes, "keys_required": True, "task": "generate"}
    error_of(server.client.get("/v1/whoami"), 401, "unauthorized")
    error_of(Client(server, "wrong").ask("GET", "/v1/whoami"), 401, "unauthorized")


def test_without_keys_everybody_may_do_everything(server: Server) -> None:
    identity = server.client.get("/v1/whoami", headers={"authorization": "Bearer whatever"}).json()
    assert identity == {"tenant": "", "scopes": ["infer", "admin"], "keys_required": False, "task": "generate"}


def test_the_task_is_the_servers(server: Server) -> None:
    server.app.state.server = replace(server.state, task=Task.EMBED)
    assert server.client.get("/v1/whoami").json()["task"] == "embed"


def test_a_key_without_scopes_can_still_ask(make_server: Callable[..., Server]) -> None:
    server = make_server([ApiKey.of("looks", scopes=frozenset[Scope]())])
    assert Client(server, "looks").ask("GET", "/v1/whoami").json()["scopes"] == []
