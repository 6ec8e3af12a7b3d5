"""Tenants: each sees its own adapters and the shared ones, and nothing says that there are others."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anyio.lowlevel
import httpx
import pytest

from adapters.errors import UnsupportedCheckpoint
from service.api.access import Access, access_to
from service.api.keys import ApiKey, Scope
from tests.api.asgi import exchange
from tests.api.conftest import BASE, Server, error_of
from tests.api.test_auth import all_routes
from tests.fakes import fake_text

KEYS = [
    ApiKey.of("acme", tenant="acme"),
    ApiKey.of("acme-infer", tenant="acme", scopes=frozenset({Scope.INFER})),
    ApiKey.of("acme-admin", tenant="acme", scopes=frozenset({Scope.ADMIN})),
    ApiKey.of("rival", tenant="rival"),
    ApiKey.of("operator"),
]


class Client:
    """What one key can do."""

    def __init__(self, server: Server, key: str) -> None:
        self._server = server
        self._headers = {"authorization": f"Bearer {key}"}

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._server.client.request(method, path, headers=self._headers, **options)

    def upload(self, name: str, adapter: str = "one", query: str = "", **fields: str) -> httpx.Response:
        files = self._server.form(adapter)
        return self.ask("POST", f"/v1/adapters{query}", data={"name": name, **fields}, files=files)

    def generate(self, **fields: Any) -> httpx.Response:
        return self.ask("POST", "/v1/generate", json={"prompt": "hi", "max_new_tokens": 40, **fields})

    def names(self, query: str = "") -> list[str]:
        return [adapter["name"] for adapter in self.ask("GET", f"/v1/adapters{query}").json()["data"]]

    def digest(self, name: str) -> str:
        return str(self.ask("GET", f"/v1/adapters/{name}").json()["digest"])


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server(KEYS, metrics_public=False)


@pytest.fixture
def acme(server: Server) -> Client:
    return Client(server, "acme")


@pytest.fixture
def rival(server: Server) -> Client:
    return Client(server, "rival")


@pytest.fixture
def operator(server: Server) -> Client:
    return Client(server, "operator")


def test_a_foreign_adapter_does_not_exist(acme: Client, rival: Client, operator: Client) -> None:
    assert acme.upload("secret").status_code == 201
    digest = acme.digest("secret")
    for other in (rival, operator):
        asked: list[tuple[str, str, Any]] = [
            ("GET", "/v1/adapters/secret", None),
            ("GET", "/v1/adapters/secret/parameters", None),
            ("GET", "/v1/adapters/secret/bank", None),
            ("GET", "/v1/adapters/secret/export", None),
            ("GET", "/v1/adapters/secret/export?format=lora", None),
            ("DELETE", "/v1/adapters/secret", None),
            ("POST", "/v1/adapters/secret/activate", None),
            ("POST", "/v1/adapters/secret/deactivate", None),
            ("POST", "/v1/adapters/secret/rollback", {"digest": digest}),
            ("POST", "/v1/unload_lora_adapter", {"lora_name": "secret"}),
            ("POST", "/v1/generate", {"prompt": "hi", "adapter": "secret"}),
            ("POST", "/v1/generate", {"prompt": "hi", "adapter": f"secret@{digest}"}),
            ("POST", "/v1/generate", {"prompt": "hi", "adapters": [{"name": "secret"}]}),
            ("POST", "/v1/completions", {"prompt": "hi", "model": "secret"}),
            ("POST", "/v1/completions", {"prompt": "hi", "model": f"secret@{digest}:0.5"}),
            ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "model": "secret"}),
            ("POST", "/generate", {"inputs": "hi", "parameters": {"adapter_id": "secret"}}),
            ("POST", "/generate_stream", {"inputs": "hi", "parameters": {"adapter_id": f"secret@{digest}"}}),
            ("POST", "/generate", {"inputs": "hi", "parameters": {"merged_adapters": {"ids": ["secret"]}}}),
            ("POST", "/v1/blends", {"name": "mixed", "adapters": [{"name": "secret", "weight": 0.5}]}),
            ("POST", "/tokenize", {"model": "secret", "messages": [{"role": "user", "content": "x"}]}),
        ]
        for method, path, body in asked:
            own = error_of(other.ask(method, path, json=body), 404, "adapter_not_found")
            unknown = json.loads(json.dumps(body).replace("secret", "nobody"))
            of_nobody = error_of(other.ask(method, path.replace("secret", "nobody"), json=unknown), 404, own["code"])
            assert own["message"].replace("secret", "nobody") == of_nobody["message"], "as if there were none"
        error_of(other.ask("GET", "/v1/models/secret"), 404, "model_not_found")
        assert other.names() == []
        assert [model["id"] for model in other.ask("GET", "/v1/models").json()["data"]] == [BASE]
        assert other.ask("GET", "/v1/parameters").json()["adapters"] == []
    assert acme.generate(adapter="secret").status_code == 200
    assert {path.replace("secret", "x") for _, path, _ in asked} >= {
        path for _, path in all_routes() if path.startswith("/v1/adapters/")
    }


def test_a_foreign_version_is_none_of_ones_own(acme: Client, rival: Client) -> None:
    acme.upload("sql", "one")
    rival.upload("sql", "two")
    foreign = acme.digest("sql")
    asked: list[tuple[str, Any]] = [
        ("/v1/generate", {"prompt": "hi", "adapter": f"sql@{foreign}"}),
        ("/v1/completions", {"prompt": "hi", "model": f"sql@{foreign}"}),
        ("/v1/blends", {"name": "mixed", "adapters": [{"name": f"sql@{foreign}", "weight": 1.0}]}),
        ("/v1/adapters/sql/rollback", {"digest": foreign}),
    ]
    for path, body in asked:
        of_nobody = json.loads(json.dumps(body).replace(foreign, f"sha256:{'0' * 64}"))
        refused = error_of(rival.ask("POST", path, json=body), 404, "adapter_not_found")["message"]
        unknown = error_of(rival.ask("POST", path, json=of_nobody), 404, "adapter_not_found")["message"]
        assert refused.replace(foreign, f"sha256:{'0' * 64}") == unknown


def test_what_a_foreign_name_is_replaced_by_is_ones_own(acme: Client, rival: Client) -> None:
    acme.upload("sql", "one")
    before = acme.ask("GET", "/v1/adapters/sql").json()
    assert rival.upload("sql", "two", "?replace=true").status_code == 201
    assert rival.upload("sql", "logits", "?replace=true").status_code == 201
    assert len(rival.ask("GET", "/v1/adapters/sql").json()["versions"]) == 2
    assert acme.ask("GET", "/v1/adapters/sql").json() == before


def test_a_foreign_name_is_free(acme: Client, rival: Client) -> None:
    acme.upload("sql", "one")
    assert rival.upload("sql", "two").status_code == 201
    assert acme.digest("sql") != rival.digest("sql")
    for client in (acme, rival):
        answer = client.generate(adapter="sql")
        assert answer.headers["x-adapter-digest"] == client.digest("sql")
        assert answer.json()["choices"][0]["text"] == fake_text(client.digest("sql"), 40)
    error_of(rival.upload("sql", "two"), 409, "adapter_exists")
    assert rival.ask("DELETE", "/v1/adapters/sql").status_code == 204
    assert acme.generate(adapter="sql").status_code == 200


def test_the_same_files_of_two_tenants_are_two_adapters(acme: Client, rival: Client) -> None:
    acme.upload("mine", "one")
    rival.upload("mine", "one")
    assert acme.ask("DELETE", "/v1/adapters/mine").status_code == 204
    assert rival.generate(adapter="mine").status_code == 200


def test_shared_adapters_are_read_by_all_and_changed_by_their_own(acme: Client, operator: Client) -> None:
    operator.upload("common")
    digest = operator.digest("common")
    assert acme.names() == ["common"]
    assert acme.digest("common") == digest
    assert acme.ask("GET", "/v1/adapters/common").json()["shared"] is True
    assert acme.ask("GET", "/v1/models/common").status_code == 200
    assert acme.ask("GET", "/v1/adapters/common/parameters").json()["digest"] == digest
    assert acme.generate(adapter=f"common@{digest}").headers["x-adapter-digest"] == digest
    for method, path, body in (
        ("DELETE", "/v1/adapters/common", None),
        ("POST", "/v1/adapters/common/rollback", {"digest": digest}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "common"}),
    ):
        error_of(acme.ask(method, path, json=body), 403, "forbidden")
    assert operator.digest("common") == digest


def test_ones_own_takes_the_place_of_a_shared_one(acme: Client, rival: Client, operator: Client) -> None:
    operator.upload("sql", "one")
    assert acme.upload("sql", "two").status_code == 201
    assert acme.ask("GET", "/v1/adapters/sql").json()["shared"] is False
    assert acme.digest("sql") != operator.digest("sql") == rival.digest("sql")
    assert acme.generate(adapter="sql").headers["x-adapter-digest"] == acme.digest("sql")
    assert acme.names() == ["sql"], "once"
    error_of(acme.ask("POST", "/v1/adapters/sql/rollback", json={"digest": operator.digest("sql")}), 404,
             "adapter_not_found")  # fmt: skip
    assert acme.ask("DELETE", "/v1/adapters/sql").status_code == 204
    assert acme.digest("sql") == operator.digest("sql")


def test_pages_hold_ones_own_and_the_shared_ones_in_order(acme: Client, rival: Client, operator: Client) -> None:
    for name in ("a", "c", "e", "g"):
        operator.upload(name, "one")
    for name in ("b", "c", "d"):
        acme.upload(name, "two")
    rival.upload("bb")
    seen: list[str] = []
    query = "?limit=2"
    while True:
        page = acme.ask("GET", f"/v1/adapters{query}").json()
        seen += [adapter["name"] for adapter in page["data"]]
        if page["next"] is None:
            break
        query = f"?limit=2&after={page['next']}"
    assert seen == ["a", "b", "c", "d", "e", "g"]
    models = [model["id"] for model in acme.ask("GET", "/v1/models").json()["data"]]
    assert models == [BASE, *seen]
    shared = {a["name"]: a["shared"] for a in acme.ask("GET", "/v1/adapters").json()["data"]}
    assert shared == {"a": True, "b": False, "c": False, "d": False, "e": True, "g": True}
    assert operator.names() == ["a", "c", "e", "g"]


def test_each_tenant_has_its_own_default(server: Server, acme: Client, rival: Client, operator: Client) -> None:
    operator.upload("common", "one")
    acme.upload("mine", "two", activate="true")
    assert acme.generate().headers["x-adapter-digest"] == acme.digest("mine")
    assert rival.generate().headers["x-adapter-digest"] == "base"
    assert operator.generate().headers["x-adapter-digest"] == "base"

    assert rival.ask("POST", "/v1/adapters/common/activate").json()["active"] is True
    assert rival.generate().headers["x-adapter-digest"] == operator.digest("common")
    assert operator.ask("GET", "/v1/adapters/common").json()["active"] is False
    rival.upload("common", "logits")
    rival.upload("mine", "two")
    server.engine.fold_error = UnsupportedCheckpoint("the base is quantized")
    assert rival.ask("POST", "/v1/adapters/mine/activate", json={"mode": "merge"}).status_code == 415
    assert rival.generate().headers["x-adapter-digest"] == operator.digest("common"), "what was activated"
    assert rival.ask("GET", "/v1/adapters/common").json()["active"] is False
    operator.ask("DELETE", "/v1/adapters/common")
    assert rival.generate().headers["x-adapter-digest"] == "base"


def test_the_engine_is_told_whose_request_it_is(server: Server, acme: Client, operator: Client) -> None:
    acme.generate()
    operator.generate()
    assert [request.tenant for request in server.engine.requests] == ["acme", ""], "what the prefix cache is keyed by"
    assert server.metrics.usage == {"acme": 40, "": 40}


def test_metrics_of_tenants_are_for_their_keys(server: Server, acme: Client, operator: Client) -> None:
    assert acme.ask("GET", "/metrics").text.endswith("# for acme\n")
    assert operator.ask("GET", "/metrics").text.endswith("# for \n")
    error_of(server.client.get("/metrics"), 401, "unauthorized")


# --- scopes ---------------------------------------------------------------------------------------


def test_what_each_scope_allows(server: Server, acme: Client) -> None:
    acme.upload("mine")
    infer, admin = Client(server, "acme-infer"), Client(server, "acme-admin")
    assert infer.generate(adapter="mine").status_code == 200
    error_of(admin.generate(adapter="mine"), 403, "forbidden")
    error_of(infer.upload("other"), 403, "forbidden")
    assert admin.upload("other", "two").status_code == 201
    for client in (infer, admin):
        assert client.names() == ["mine", "other"]
    for method, path in (
        ("DELETE", "/v1/adapters/mine"),
        ("POST", "/v1/adapters/mine/activate"),
        ("POST", "/v1/adapters/mine/deactivate"),
        ("POST", "/v1/adapters/mine/rollback"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ):
        assert "admin" in error_of(infer.ask(method, path, json={}), 403, "forbidden")["message"]
    assert infer.names() == ["mine", "other"]


def test_every_route_is_of_the_kind_that_it_should_be() -> None:
    kinds: dict[Access, set[str]] = {access: set() for access in Access}
    for method, path in all_routes():
        kinds[access_to(method, path, metrics_public=False)].add(f"{method} {path}")
    assert kinds[Access.INFER] >= {
        "POST /v1/generate",
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "POST /generate",
        "POST /generate_stream",
        "POST /v1/classify",
        "POST /v1/embeddings",
    }
    assert kinds[Access.ADMIN] >= {
        "POST /v1/adapters",
        "DELETE /v1/adapters/x",
        "POST /v1/adapters/x/activate",
        "POST /v1/adapters/x/deactivate",
        "POST /v1/adapters/x/rollback",
        "POST /v1/load_lora_adapter",
        "POST /v1/unload_lora_adapter",
    }
    changing = {route for route in kinds[Access.ANY] if not route.startswith(("GET ", "HEAD "))}
    assert changing == {"POST /tokenize", "POST /detokenize", "POST /v1/parameters/estimate"}, "they change nothing"
    assert {route for route in kinds[Access.PUBLIC] if not route.startswith("GET /docs")} == {
        "GET /",
        "HEAD /",
        "GET /assets/x",
        "HEAD /assets/x",
        "GET /healthz",
        "HEAD /healthz",
        "GET /readyz",
        "HEAD /readyz",
        "GET /openapi.json",
    }


# What a client can make of a route's path, for it to look like another one, or like none.
TRICKS = ("{}\n", "{}\n\n", "\n{}", "{}/", "/{}", "{} ", "{}\0", "{}\r", "{}?", "{}#", "{}%0A", "{};x", "/docs/..{}")


@pytest.mark.anyio
@pytest.mark.parametrize("trick", TRICKS)
async def test_no_way_to_write_a_path_changes_what_it_takes(server: Server, trick: str) -> None:
    """As the application is given paths: with their escapes undone."""

    async def status(method: str, path: str, key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        async with exchange(server.app, method, path, body={}, headers=headers) as client:
            return await client.status()

    for method, path in all_routes():
        scope = access_to(method, path, metrics_public=False).scope
        if scope is not None:
            other = {Scope.INFER: "acme-admin", Scope.ADMIN: "acme-infer"}[scope]
            assert await status(method, trick.format(path), other) in (403, 404, 405), path


@pytest.mark.anyio
@pytest.mark.parametrize(("key", "status"), [("wrong", 401), ("acme-infer", 403)])
async def test_without_the_right_no_body_is_read(server: Server, key: str, status: int) -> None:
    headers = {"authorization": f"Bearer {key}"}
    async with exchange(server.app, "POST", "/v1/adapters", body={"name": "x"}, headers=headers) as client:
        assert await client.status() == status
        await client.end()
        assert client.reads == 0


# --- limits ---------------------------------------------------------------------------------------


def test_a_keys_limits_are_its_own(make_server: Callable[..., Server]) -> None:
    server = make_server([ApiKey.of("slow", rate=2), ApiKey.of("free")])
    slow, free = Client(server, "slow"), Client(server, "free")
    assert [slow.ask("GET", "/v1/models").status_code for _ in range(3)] == [200, 200, 429]
    refused = slow.generate()
    assert int(refused.headers["retry-after"]) >= 1
    error_of(refused, 429, "overloaded")
    assert free.generate().status_code == 200
    error_of(server.client.get("/v1/models"), 401, "unauthorized")


def test_what_the_page_asks_all_the_time_is_not_taken_off_a_keys_limit(make_server: Callable[..., Server]) -> None:
    page = Client(make_server([ApiKey.of("slow", rate=1)]), "slow")
    assert [page.ask("GET", path).status_code for path in ("/v1/stats", "/v1/whoami") * 3] == [200] * 6
    assert [page.ask("GET", "/v1/models").status_code for _ in range(2)] == [200, 429]
    assert page.ask("GET", "/v1/stats").status_code == 200


@pytest.mark.anyio
async def test_beyond_its_limit_no_body_is_read(make_server: Callable[..., Server]) -> None:
    server = make_server([ApiKey.of("slow", rate=1)])
    assert Client(server, "slow").names() == []
    async with exchange(
        server.app, "POST", "/v1/generate", body={"prompt": "hi"}, headers={"authorization": "Bearer slow"}
    ) as client:
        assert await client.status() == 429
        await client.end()
        assert client.reads == 0


@pytest.mark.anyio
async def test_streams_count_while_they_run(make_server: Callable[..., Server]) -> None:
    server = make_server([ApiKey.of("one", concurrency=1)])
    server.engine.hold_after = 2
    headers = {"authorization": "Bearer one"}
    body = {"prompt": "hi", "max_new_tokens": 5, "stream": True}
    async with exchange(server.app, "POST", "/v1/generate", body=body, headers=headers) as running:
        assert await running.status() == 200
        async with exchange(server.app, "GET", "/v1/models", headers=headers) as refused:
            assert await refused.status() == 429
            await refused.text()
        while server.engine.gate.is_set():
            await anyio.lowlevel.checkpoint()  # until the engine holds
        server.engine.gate.set()
        while "[DONE]" not in await running.text():
            pass
        await running.text()
        await running.end()
    async with exchange(server.app, "GET", "/v1/models", headers=headers) as after:
        assert await after.status() == 200
        await after.text()


@pytest.mark.anyio
async def test_what_runs_ends_as_it_would_have_when_its_key_is_taken_away(server: Server) -> None:
    server.engine.hold_after = 2
    headers = {"authorization": "Bearer acme"}
    body = {"prompt": "hi", "max_new_tokens": 5, "stream": True}
    async with exchange(server.app, "POST", "/v1/generate", body=body, headers=headers) as running:
        assert await running.status() == 200
        while server.engine.gate.is_set():
            await anyio.lowlevel.checkpoint()  # until the engine holds
        server.state.keys.replace([ApiKey.of("new", tenant="acme")])
        async with exchange(server.app, "GET", "/v1/models", headers=headers) as refused:
            assert await refused.status() == 401
        server.engine.gate.set()
        while "[DONE]" not in await running.text():
            pass
        await running.end()


def test_keys_may_be_replaced_while_serving(server: Server, acme: Client) -> None:
    assert acme.names() == []
    server.state.keys.replace([ApiKey.of("new", tenant="acme")])
    error_of(acme.ask("GET", "/v1/adapters"), 401, "unauthorized")
    assert Client(server, "new").names() == []
