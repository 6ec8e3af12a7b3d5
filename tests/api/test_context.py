"""Request ids, the access log, metrics, and the errors that nobody expected."""

from __future__ import annotations

import logging
import re

import pytest

from tests.api.asgi import exchange
from tests.api.conftest import Server, error_of


@pytest.mark.parametrize("path", ["/healthz", "/nope", "/v1/adapters/nope", "/v1/adapters?limit=0"])
def test_the_clients_id_comes_back_on_every_response(server: Server, path: str) -> None:
    response = server.client.get(path, headers={"x-request-id": "my.id_1-2"})
    assert response.headers.get_list("x-request-id") == ["my.id_1-2"]


@pytest.mark.parametrize("path", ["/healthz", "/nope", "/v1/adapters", "/v1/adapters/nope", "/openapi.json"])
def test_no_cache_keeps_an_answer_and_no_browser_guesses_what_it_is(server: Server, path: str) -> None:
    headers = server.client.get(path).headers
    assert headers.get_list("cache-control") == ["no-store"]
    assert headers.get_list("x-content-type-options") == ["nosniff"]


def test_pages_and_streams_say_themselves_how_they_may_be_kept(server: Server) -> None:
    assert server.client.get("/").headers.get_list("cache-control") == ["no-cache"]
    with server.client.stream("POST", "/v1/generate", json={"prompt": "hi", "stream": True}) as streamed:
        assert streamed.headers.get_list("cache-control") == ["no-cache"]


@pytest.mark.parametrize("offered", ["", "a b", "x" * 129, "<script>", "é"])
def test_an_id_that_is_not_sane_is_replaced(server: Server, offered: str) -> None:
    response = server.client.get("/healthz", headers={"x-request-id": offered.encode()})
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


def test_ids_differ(server: Server) -> None:
    assert (
        server.client.get("/healthz").headers["x-request-id"] != server.client.get("/healthz").headers["x-request-id"]
    )


def test_the_same_request_id_twice_is_two_generations(server: Server) -> None:
    headers = {"x-request-id": "same"}
    ids = [server.client.post("/v1/generate", json={"prompt": "hi"}, headers=headers).json()["id"] for _ in range(2)]
    assert ids[0] != ids[1]


def test_one_line_in_the_access_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vblora.access"):
        server.client.get("/v1/adapters/nope?secret=1", headers={"x-request-id": "abc"})
    (record,) = [record for record in caplog.records if record.name == "vblora.access"]
    assert (record.method, record.path, record.status) == ("GET", "/v1/adapters/nope", 404)
    assert (record.request_id, record.code) == ("abc", "adapter_not_found")
    assert record.duration_s >= 0


def test_requests_are_counted_by_their_routes_template(server: Server) -> None:
    server.upload("sql")
    server.client.get("/v1/adapters/sql")
    server.client.get("/v1/adapters/nope")
    server.client.get("/no/such/route")
    assert server.metrics.requests == {
        ("/v1/adapters", 201): 1,
        ("/v1/adapters/{name}", 200): 1,
        ("/v1/adapters/{name}", 404): 1,
        ("unmatched", 404): 1,
    }
    assert server.metrics.errors == {"adapter_not_found": 1, "not_found": 1}


@pytest.mark.parametrize("stream", [True, False])
def test_a_bug_is_500_logged_under_the_requests_id_and_leaks_nothing(
    server: Server, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    server.engine.refusal = ZeroDivisionError("secret detail")
    body = {"prompt": "hi", "stream": stream}
    response = server.client.post("/v1/generate", json=body, headers={"x-request-id": "abc"})
    error = error_of(response, 500, "internal_error")
    assert error["type"] == "server_error"
    assert "abc" in error["message"]
    assert "secret" not in response.text
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.request_id == "abc"
    assert record.exc_info[0] is ZeroDivisionError


def test_a_store_in_trouble_is_500_and_keeps_its_paths_to_itself(server: Server) -> None:
    server.store.close()
    response = server.client.get("/v1/adapters")
    error_of(response, 500, "internal_error")
    assert str(server.data_dir) not in response.text


@pytest.mark.anyio
async def test_a_bug_after_the_response_began_cuts_the_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server then closes the connection, and the client sees that the response is not whole."""

    async def broken(self: object, scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        raise ZeroDivisionError

    monkeypatch.setattr("starlette.responses.HTMLResponse.__call__", broken)
    async with exchange(server.app, "GET", "/docs") as client:
        assert await client.status() == 200
        await client.end()
        assert client.error is not None
