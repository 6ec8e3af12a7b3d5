"""The ingress before replicas that are in this process: what a client sees is what one server would show it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from adapters.errors import StoreUnavailable
from service.api.keys import ApiKey, KeyRing
from service.cluster import ingress as ingress_module
from service.cluster.ingress import Ingress
from service.cluster.metrics import IngressMetrics
from service.metrics import PrometheusMetrics
from tests.api.asgi import WAIT_S, exchange
from tests.api.conftest import Server, error_of
from tests.direct_replicas import DirectReplicas
from tests.fakes import fake_text

GENERATE = {"prompt": "hi", "max_new_tokens": 12}


class Front:
    """An ingress before two replicas that are one server asked twice: their store is one."""

    def __init__(self, server: Server, keys: tuple[ApiKey, ...] = ()) -> None:
        self.server = server
        self.replicas = DirectReplicas([server.state, server.state])
        self.metrics = IngressMetrics()
        self.app = Ingress(self.replicas, server.store, KeyRing(keys), server.state.settings, self.metrics)
        self.client = TestClient(self.app)

    def generate(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/generate", json={**GENERATE, **fields})

    def lost(self) -> float:
        return counter(self, "vblora_replicas_lost_total")


def counter(front: Front, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(front.metrics.render(2)[0])
    return next(
        sample.value
        for family in families
        for sample in family.samples
        if (sample.name, sample.labels) == (name, labels)
    )


@pytest.fixture
def front(server: Server) -> Front:
    return Front(server)


def test_answers_are_the_servers_own(front: Front) -> None:
    assert front.server.upload("sql").status_code == 201
    whole = front.generate(adapter="sql")
    assert whole.status_code == 200
    assert whole.json()["choices"][0]["text"] == fake_text(front.server.digest("sql"), 12)
    assert whole.headers["x-adapter-digest"] == front.server.digest("sql")
    streamed = front.generate(adapter="sql", stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")
    error_of(front.client.get("/v1/none"), 404, "not_found")
    error_of(front.generate(adapter="none"), 404, "adapter_not_found")
    error_of(front.generate(adapter=7), 400, "invalid_request")
    assert front.client.get("/openapi.json").json() == front.server.client.get("/openapi.json").json()


def test_an_upload_goes_through_whole_and_in_pieces(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress_module, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(ingress_module, "_PIECE_BYTES", 500)
    files = {name: (name, data) for name, data in front.server.form().items()}
    response = front.client.post("/v1/adapters", data={"name": "sql"}, files=files)
    assert response.status_code == 201, response.text
    _, request = front.replicas.asked[-1]
    assert not isinstance(request.body[0], bytes)
    front.server.upload("same")
    assert front.server.digest("same") == response.json()["digest"]


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": "sql"}, {"adapters": [{"name": "sql", "weight": 0.5}]},
        {"adapters": [{"name": "sql"}, {"name": "again", "weight": 2}]},
    ],
)  # fmt: skip
def test_requests_with_the_same_files_have_one_home(front: Front, fields: dict[str, Any]) -> None:
    front.server.upload("sql")
    front.server.upload("again")
    front.generate(**fields)
    assert front.replicas.asked[-1][1].affinity == front.server.digest("sql")


def test_every_route_says_what_it_is_for(front: Front) -> None:
    front.server.upload("sql")
    digest = front.server.digest("sql")

    def affinity(path: str, **body: Any) -> str | None:
        front.client.post(path, json=body)
        return front.replicas.asked[-1][1].affinity

    message = [{"role": "user", "content": "hi"}]
    assert affinity("/v1/completions", model="sql", prompt="hi") == digest
    assert affinity("/v1/chat/completions", model="sql:0.5", messages=message) == digest
    assert affinity("/generate", inputs="hi", parameters={"adapter_id": "sql"}) == digest
    assert affinity("/generate", inputs="hi", parameters={"merged_adapters": {"ids": ["sql"]}}) == digest
    assert affinity("/v1/completions", model="tiny-llama", prompt="hi") is None
    assert affinity("/v1/generate", prompt="hi") is None
    front.server.client.post("/v1/adapters/sql/activate")
    assert affinity("/v1/generate", prompt="hi") == digest
    assert affinity("/v1/generate", prompt="hi", adapter="base") is None
    assert affinity("/v1/generate", prompt="hi", adapter="none") is None


def test_a_replica_lost_before_the_first_byte_is_made_good(front: Front) -> None:
    front.replicas.lose = [0]
    assert front.generate().status_code == 200
    assert (len(front.replicas.asked), front.lost()) == (2, 1)


def test_two_lost_are_an_error(front: Front) -> None:
    front.replicas.lose = [0, 0]
    error_of(front.generate(), 503, "engine_unavailable")
    assert len(front.replicas.asked) == 2


def test_what_may_have_been_done_is_not_done_again(front: Front) -> None:
    front.server.upload("sql")
    front.replicas.lose = [0]
    error = error_of(front.client.delete("/v1/adapters/sql"), 503, "engine_unavailable")
    assert "may or may not" in error["message"]
    assert len(front.replicas.asked) == 1


def test_a_stream_whose_replica_is_lost_ends_with_an_error(front: Front) -> None:
    front.replicas.lose = [2]
    text = front.generate(stream=True, max_new_tokens=40).text
    assert "[DONE]" not in text
    frames = [frame for frame in text.split("\n\n") if frame]
    assert frames[0].startswith("data: ")
    assert frames[-1].startswith("event: error\ndata: ")
    assert json.loads(frames[-1].split("data: ")[1])["error"]["code"] == "engine_unavailable"
    assert len(front.replicas.asked) == 1


def test_when_all_are_full(front: Front) -> None:
    front.replicas.full = True
    response = front.generate()
    error_of(response, 429, "overloaded")
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_place(front: Front, stream: bool) -> None:
    engine = front.server.engine
    engine.gate.clear()
    async with exchange(front.app, "POST", "/v1/generate", body={**GENERATE, "stream": stream}) as client:
        await asyncio.to_thread(engine.submitted.wait, WAIT_S)
        assert not engine.cancelled.is_set()
        client.leave()
        await client.end()
    assert engine.cancelled.is_set()


def test_keys_are_asked_for_here_and_limits_counted_once(make_server: Callable[..., Server]) -> None:
    key = ApiKey.of("secret", tenant="acme", rate=2)
    front = Front(make_server(keys=[key]), (key,))
    error_of(front.generate(), 401, "unauthorized")
    assert front.replicas.asked == []
    front.client.headers["authorization"] = "Bearer secret"
    assert [front.generate().status_code for _ in range(3)] == [200, 200, 429]
    assert front.replicas.asked[0][1].key == key
    assert front.client.get("/v1/whoami").json()["tenant"] == "acme"


def test_changes_are_counted_for_the_replicas(front: Front) -> None:
    refreshed: list[int] = []
    front.server.store.refresh = lambda: refreshed.append(1)  # type: ignore[attr-defined]
    files = {name: (name, data) for name, data in front.server.form().items()}
    front.client.post("/v1/adapters", data={"name": "sql"}, files=files)
    assert len(refreshed) == 1, "the ingress's own"
    front.generate(adapter="sql")
    assert front.replicas.asked[-1][1].seen[1] == 1
    front.client.post("/v1/adapters", data={"name": "sql"}, files=files)  # refused: nothing has changed
    front.generate(adapter="sql")
    assert front.replicas.asked[-1][1].seen[1] == 1


def test_only_what_an_admin_does_is_a_change(front: Front) -> None:
    refreshed: list[int] = []
    front.server.store.refresh = lambda: refreshed.append(1)  # type: ignore[attr-defined]
    assert front.client.post("/tokenize", json={"prompt": "hi"}).status_code == 200
    front.generate(adapter="base")
    assert (refreshed, front.replicas.asked[-1][1].seen[1]) == ([], 0)


def test_a_store_that_does_not_answer_is_not_asked_for_every_request(front: Front) -> None:
    asked: list[int] = []

    def refresh() -> None:
        asked.append(1)
        raise StoreUnavailable("the storage is away")

    front.server.store.refresh = refresh  # type: ignore[attr-defined]
    files = {name: (name, data) for name, data in front.server.form().items()}
    front.client.post("/v1/adapters", data={"name": "sql"}, files=files)
    for _ in range(8):
        assert front.generate(adapter="sql").status_code == 200
    assert len(asked) <= 1 + 2, "the ingress, and each replica once"


def test_draining(front: Front) -> None:
    assert front.client.get("/readyz").json() == {"status": "ready"}
    assert front.app.work.drain(0.1)
    assert "draining" in error_of(front.client.get("/readyz"), 503, "engine_unavailable")["message"]
    assert front.client.get("/healthz").status_code == 200
    error_of(front.generate(), 503, "engine_unavailable")


@pytest.mark.anyio
async def test_what_runs_when_the_time_is_up_is_told(front: Front) -> None:
    front.server.engine.hold_after = 1
    async with exchange(front.app, "POST", "/v1/generate", body={**GENERATE, "stream": True}) as client:
        assert await client.status() == 200
        await client.text()
        assert not await asyncio.to_thread(front.app.work.drain, 0.01)
        front.app.work.stop()
        assert "stopping" in await client.text()
        await client.end()
    assert front.server.engine.cancelled.is_set()


@pytest.mark.anyio
async def test_a_body_that_is_half_there_when_the_time_is_up_is_told(front: Front) -> None:
    async with exchange(front.app, "POST", "/v1/generate") as client:
        client.send_body(b'{"prompt":', more=True)
        client.send_body(b'"hi', more=True)
        async with asyncio.timeout(WAIT_S):
            await client.wants_more.wait()
        assert not await asyncio.to_thread(front.app.work.drain, 0.01)
        front.app.work.stop()
        assert await client.status() == 503
        assert await client.error_code() == "engine_unavailable"
        await client.end()
    assert client.error is None
    assert front.app.work.drain(0)


def test_what_no_replica_answers_is_counted_with_its_route(front: Front) -> None:
    front.replicas.full = True
    front.generate()
    assert counter(front, "vblora_requests_total", route="/v1/generate", status="429") == 1


def test_metrics_and_stats_of_all(server: Server) -> None:
    front = Front(server)
    real = PrometheusMetrics(server.engine, server.registry, server.store)
    object.__setattr__(server.state, "metrics", real)
    front.generate()
    response = front.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
    assert {sample.labels["replica"] for sample in samples if sample.name == "vblora_queue_depth"} == {"0", "1"}
    assert [s.value for s in samples if s.name == "vblora_requests_total"] == [1.0]
    assert [s.labels["route"] for s in samples if s.name == "vblora_requests_total"] == ["/v1/generate"]
    stats = front.client.get("/v1/stats").json()
    assert stats["limits"]["max_batch_size"] == 2 * server.engine.max_batch_size
