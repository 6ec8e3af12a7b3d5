"""API keys."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator

import pytest

from service.api import routes
from service.api.keys import ApiKey
from tests.api.asgi import exchange
from tests.api.conftest import Server, error_of

KEYS = ("first-key", "second-key")
PUBLIC = {
    "/", "/healthz", "/readyz", "/openapi.json", "/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css",
    "/docs/favicon-32x32.png", "/assets/x",
}  # fmt: skip


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server(keys=map(ApiKey.of, KEYS))


def all_routes() -> Iterator[tuple[str, str]]:
    """(method, path) of every route of every router, path parameters filled in."""
    yield "GET", "/openapi.json"
    for module in pkgutil.iter_modules(routes.__path__, f"{routes.__name__}."):
        for route in importlib.import_module(module.name).router.routes:
            for method in route.methods:
                yield method, re.sub(r"{[^}]*}", "x", route.path)


def test_every_route_but_the_public_ones_needs_a_key(server: Server) -> None:
    found = set(all_routes())
    paths = {path for _, path in found}
    assert paths > PUBLIC
    described = {re.sub(r"{[^}]*}", "x", path) for path in server.app.openapi()["paths"]}
    assert described <= paths
    for method, path in found:
        response = server.client.request(method, path)
        if path in PUBLIC:
            assert response.status_code == (404 if path == "/assets/x" else 200), path
        else:
            error = error_of(response, 401, "unauthorized")
            assert error["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/nope", "/v1/adapters/", "/docs/../v1/adapters", "/healthz/x", "/docsx"])
def test_what_is_no_public_path_needs_a_key(server: Server, path: str) -> None:
    error_of(server.client.get(path), 401, "unauthorized")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_each_key_opens(server: Server, key: str, scheme: str) -> None:
    headers = {"authorization": f"{scheme} {key}"}
    assert server.client.get("/v1/adapters", headers=headers).status_code == 200
    error_of(server.client.get("/nope", headers=headers), 404, "not_found")


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer wrong", "Bearer first-key2", "Basic first-key", "first-key"]
)
def test_nothing_else_opens(server: Server, header: str) -> None:
    error_of(server.client.get("/v1/adapters", headers={"authorization": header}), 401, "unauthorized")


def test_a_keys_digest_is_no_key(server: Server) -> None:
    headers = {"authorization": f"Bearer {ApiKey.of(KEYS[0]).digest}"}
    error_of(server.client.get("/v1/adapters", headers=headers), 401, "unauthorized")


@pytest.mark.parametrize("public", [True, False])
def test_metrics_may_be_public(make_server: Callable[..., Server], public: bool) -> None:
    server = make_server(keys=[ApiKey.of("key")], metrics_public=public)
    assert server.client.get("/metrics").status_code == (200 if public else 401)


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/generate"])
async def test_without_a_key_no_body_is_read(server: Server, path: str) -> None:
    async with exchange(server.app, "POST", path, body={"prompt": "hi"}) as client:
        assert await client.status() == 401
        await client.end()
        assert client.reads == 0


def test_without_keys_every_route_is_open(make_server: Callable[..., Server]) -> None:
    assert make_server().client.get("/v1/adapters").status_code == 200
