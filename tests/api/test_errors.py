"""The one envelope, wherever an error comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from adapters import errors as adapter_errors
from adapters.errors import AdapterError
from service.api.errors import STATUS, ApiError, api_error
from service.engine.errors import EngineError
from tests.api.asgi import exchange
from tests.api.conftest import Server, error_of

JSON = {"content-type": "application/json"}

# The table of the contract.
CONTRACT = {
    "invalid_request": 400, "context_length_exceeded": 400, "unauthorized": 401, "forbidden": 403,
    "adapter_not_found": 404, "model_not_found": 404, "request_timeout": 408, "adapter_exists": 409,
    "payload_too_large": 413, "unsupported_checkpoint": 415, "invalid_safetensors": 422, "bad_config": 422,
    "missing_tensor": 422, "unexpected_tensor": 422, "shape_mismatch": 422, "bad_index": 422, "bad_weights": 422,
    "non_finite": 422, "no_target_matched": 422, "base_model_mismatch": 422, "overloaded": 429,
    "internal_error": 500, "storage_full": 507,
}  # fmt: skip


def subclasses(kind: type) -> Iterator[type]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from subclasses(subclass)


def test_statuses_are_the_contracts() -> None:
    assert STATUS.items() >= CONTRACT.items()


@pytest.mark.parametrize("kind", [*subclasses(AdapterError), *subclasses(EngineError)])
def test_every_error_of_the_trees_has_a_status(kind: type[AdapterError] | type[EngineError]) -> None:
    assert kind.code in STATUS


def test_what_is_internal_is_not_told() -> None:
    error = api_error(adapter_errors.StoreCorrupt("/secret/path is damaged"), "abc")
    assert (error.code, error.status_code) == ("internal_error", 500)
    assert "/secret" not in error.message


def test_a_code_that_nobody_knows_is_an_internal_error() -> None:
    assert ApiError("surprise", "what").status_code == 500


@pytest.mark.parametrize("path", ["/nope", "/v1", "/v1/adapters/", "/v1/adapters/a/b", "/docs/nope.js"])
def test_an_unknown_route_has_the_envelope(server: Server, path: str) -> None:
    error = error_of(server.client.get(path), 404, "not_found")
    assert path in error["message"]
    assert error["type"] == "not_found_error"


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/generate"), ("PUT", "/v1/adapters"), ("POST", "/healthz")])
def test_a_method_that_is_not_allowed_has_the_envelope(server: Server, method: str, path: str) -> None:
    response = server.client.request(method, path)
    error_of(response, 405, "method_not_allowed")
    assert response.headers["allow"]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/adapters", {"GET", "POST"}),
        ("/v1/adapters/sql", {"GET", "DELETE"}),
        ("/v1/adapters/sql/activate", {"POST"}),
        ("/v1/models", {"GET"}),
        ("/", {"GET", "HEAD"}),
    ],
)
def test_the_allow_header_lists_every_method_of_a_path(server: Server, path: str, methods: set[str]) -> None:
    response = server.client.request("PATCH", path)
    error_of(response, 405, "method_not_allowed")
    assert set(response.headers["allow"].split(", ")) == methods


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"type": "json_schema"}, "response_format.json_schema", "is missing"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.name", "is missing"),
        ({"type": "json_object", "schema": {}}, "response_format.schema", "unknown field"),
        ({"type": "xml"}, "response_format", "'xml'"),
        ("json", "response_format", "input should be an object"),
    ],
)
def test_an_error_in_a_response_format_names_what_was_written(
    server: Server, asked: object, param: str, said: str
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": asked}
    error = error_of(server.client.post("/v1/chat/completions", json=body), 400, "invalid_request")
    assert error["param"] == param
    assert repr(param) in error["message"]
    assert said in error["message"]


def test_an_empty_list_is_refused_in_plain_words(server: Server) -> None:
    error = error_of(server.client.post("/v1/chat/completions", json={"messages": []}), 400, "invalid_request")
    assert error["message"] == "'messages': list should have at least 1 item, not 0"


@pytest.mark.parametrize("content", [b"{", b"{'prompt': 1}", b'{"prompt": "\xff"}', b"[" * 100_000])
def test_malformed_json_has_the_envelope(server: Server, content: bytes) -> None:
    error = error_of(server.client.post("/v1/generate", content=content, headers=JSON), 400, "invalid_request")
    assert "JSON" in error["message"]


@pytest.mark.parametrize("content", [b"", b"[]", b'"text"', b"null", b"5"])
def test_a_body_that_is_no_object_has_the_envelope(server: Server, content: bytes) -> None:
    error = error_of(server.client.post("/v1/generate", content=content, headers=JSON), 400, "invalid_request")
    assert "JSON object" in error["message"]


def test_json_under_another_content_type_is_refused(server: Server) -> None:
    response = server.client.post("/v1/generate", content=b'{"prompt": "hi"}', headers={"content-type": "text/plain"})
    assert "application/json" in error_of(response, 400, "invalid_request")["message"]


def test_what_cannot_be_encoded_does_not_break_the_envelope(server: Server) -> None:
    response = server.client.post("/v1/generate", content=b'{"prompt": "hi", "\\ud800": 1}', headers=JSON)
    error_of(response, 400, "invalid_request")
    assert ApiError("invalid_request", "\ud800", param="\ud800").envelope()["error"]["param"] == "\\ud800"


def test_a_body_too_large_is_413(make_server: Callable[..., Server]) -> None:
    server = make_server(max_body_bytes=100)
    error_of(server.generate(prompt="x" * 100), 413, "payload_too_large")


@pytest.mark.anyio
async def test_a_body_that_becomes_too_large_is_413(make_server: Callable[..., Server]) -> None:
    server = make_server(max_body_bytes=100)
    async with exchange(server.app, "POST", "/v1/generate") as client:
        client.send_body(b'{"prompt": "', more=True)
        client.send_body(b"x" * 100, more=True)
        assert await client.status() == 413
        assert await client.error_code() == "payload_too_large"


@pytest.mark.anyio
async def test_a_body_that_does_not_come_is_408(make_server: Callable[..., Server]) -> None:
    server = make_server(body_timeout_s=0.05)
    async with exchange(server.app, "POST", "/v1/generate") as client:
        client.send_body(b'{"prompt": "', more=True)
        assert await client.status() == 408
        assert await client.error_code() == "request_timeout"
    assert server.metrics.errors == {"request_timeout": 1}
