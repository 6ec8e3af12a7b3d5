"""Cross-origin requests, as browsers make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from service.api.keys import ApiKey
from tests.api.asgi import exchange
from tests.api.conftest import Server, error_of

PAGE = "https://page.example"
OTHER = "https://other.example"
KEY = {"authorization": "Bearer key"}


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    """One that asks for a key and lets two origins in."""
    keys = [ApiKey.of("key")]
    return make_server(cors_origins=(PAGE, "http://localhost:3000"), keys=keys, max_body_bytes=1000)


def preflight(server: Server, origin: str, method: str = "POST", path: str = "/v1/generate") -> httpx.Response:
    asked = {"access-control-request-method": method, "access-control-request-headers": "authorization,x-request-id"}
    return server.client.options(path, headers={"origin": origin, **asked})


def test_off_by_default(make_server: Callable[..., Server]) -> None:
    server = make_server()
    response = server.client.get("/healthz", headers={"origin": PAGE})
    assert not [name for name in response.headers if name.startswith("access-control")]
    error_of(preflight(server, PAGE), 405, "method_not_allowed")


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_preflight_passes_without_a_key(server: Server, method: str) -> None:
    response = preflight(server, PAGE, method, "/v1/adapters/sql")
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert method in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-headers"] == "authorization,x-request-id"
    assert "Origin" in response.headers["vary"]
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(("origin", "method"), [(OTHER, "POST"), ("null", "POST"), (PAGE, "PATCH")])
def test_a_preflight_of_others_is_refused_in_our_envelope(server: Server, origin: str, method: str) -> None:
    response = preflight(server, origin, method)
    error = error_of(response, 403, "forbidden")
    assert origin in error["message"]
    assert "--cors-origin" in error["message"]
    assert "access-control-allow-origin" not in response.headers
    assert server.metrics.errors == {"forbidden": 1}


def test_a_page_may_read_the_answer_and_our_headers(server: Server) -> None:
    response = server.client.post("/v1/generate", json={"prompt": "hi"}, headers={"origin": PAGE, **KEY})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["access-control-expose-headers"] == "X-Request-ID, X-Adapter-Digest, Retry-After"
    assert "access-control-allow-credentials" not in response.headers
    assert response.headers["x-adapter-digest"] == "base"


def test_another_page_may_not(server: Server) -> None:
    response = server.client.get("/v1/adapters", headers={"origin": OTHER, **KEY})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers
    assert response.headers["vary"] == "Origin"


def test_a_page_may_read_errors(server: Server) -> None:
    """Those of routes, those of every layer around them, and those that nobody expected."""

    def post(headers: dict[str, str], **body: object) -> httpx.Response:
        return server.client.post("/v1/generate", json=body, headers={"origin": PAGE, **headers})

    server.engine.refusal = ZeroDivisionError("secret")
    answers = [
        (post({}, prompt="hi"), 401, "unauthorized"),
        (post(KEY, prompt="x" * 2000), 413, "payload_too_large"),
        (post(KEY, prompt="hi", adapter="nope"), 404, "adapter_not_found"),
        (post(KEY, prompt=1), 400, "invalid_request"),
        (post(KEY, prompt="hi"), 500, "internal_error"),
    ]
    for response, status, code in answers:
        error_of(response, status, code)
        assert response.headers["access-control-allow-origin"] == PAGE, code
        assert "X-Request-ID" in response.headers["access-control-expose-headers"], code


def test_every_origin(make_server: Callable[..., Server]) -> None:
    server = make_server(cors_origins=("*",), keys=[ApiKey.of("key")])
    for response in (preflight(server, OTHER), server.client.get("/v1/adapters", headers={"origin": OTHER, **KEY})):
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "*"


def test_what_is_no_preflight_needs_a_key(server: Server) -> None:
    response = server.client.options("/v1/generate", headers={"origin": PAGE})
    error_of(response, 401, "unauthorized")


def test_without_keys_a_page_of_another_site_changes_nothing(make_server: Callable[..., Server]) -> None:
    """What it may send without a preflight: forms, and nothing at all."""
    server = make_server(cors_origins=(PAGE,))
    server.upload("sql")

    def send(path: str, origin: str, site: str, **options: Any) -> int:
        headers = {"origin": origin, "sec-fetch-site": site}
        return server.client.post(path, headers=headers, **options).status_code

    for origin, site, refused in (
        (OTHER, "cross-site", True),
        ("null", "cross-site", True),
        (PAGE, "cross-site", False),
        ("http://testserver", "same-origin", False),
        ("http://localhost:3000", "same-site", False),
    ):
        form = {"data": {"name": "other"}, "files": server.form("two")}
        assert send("/v1/adapters?replace=true", origin, site, **form) == (403 if refused else 201)
        assert send("/v1/adapters/sql/activate", origin, site) == (403 if refused else 200)
        server.client.post("/v1/adapters/sql/deactivate")
    asked = {"origin": OTHER, "sec-fetch-site": "cross-site"}
    assert server.client.get("/docs", headers=asked).status_code == 200, "a link leads here"
    assert (
        "--cors-origin"
        in error_of(server.client.delete("/v1/adapters/sql", headers=asked), 403, "forbidden")["message"]
    )


def test_a_page_that_has_a_key_is_no_stranger(server: Server) -> None:
    asked = {"origin": OTHER, "sec-fetch-site": "cross-site"}  # as a proxy hands it on that answers for CORS itself
    assert server.client.post("/v1/generate", json={"prompt": "hi"}, headers={**asked, **KEY}).status_code == 200


@pytest.mark.anyio
async def test_of_a_page_of_another_site_no_body_is_read(make_server: Callable[..., Server]) -> None:
    headers = {"origin": OTHER, "sec-fetch-site": "cross-site"}
    async with exchange(make_server().app, "POST", "/v1/generate", body={"prompt": "hi"}, headers=headers) as client:
        assert await client.status() == 403
        await client.end()
        assert client.reads == 0
