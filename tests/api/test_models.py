"""GET /v1/models."""

from __future__ import annotations

import pytest

from tests.api.conftest import ALIAS, BASE, Server, error_of


def test_the_base_and_every_adapter_are_models(server: Server) -> None:
    for name in "abcde":
        server.upload(name)
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    base, *adapters = listed["data"]
    assert base == {
        "id": BASE,
        "object": "model",
        "created": 1700000000,
        "owned_by": "vblora-serve",
        "root": BASE,
        "parent": None,
    }
    assert [adapter["id"] for adapter in adapters] == list("abcde")
    assert all(adapter["parent"] == BASE and adapter["root"] == BASE for adapter in adapters)
    assert all(isinstance(adapter["created"], int) for adapter in adapters)


@pytest.mark.parametrize("name", [BASE, ALIAS, "base"])
def test_the_base_is_found_by_all_its_names(server: Server, name: str) -> None:
    assert server.client.get(f"/v1/models/{name}").json()["id"] == BASE


def test_an_adapter_is_found(server: Server) -> None:
    server.upload("sql")
    assert server.client.get("/v1/models/sql").json() == server.client.get("/v1/models").json()["data"][1]


@pytest.mark.parametrize("name", ["nope", "org/nope", "sql@sha256:00000000"])
def test_an_unknown_model_is_404(server: Server, name: str) -> None:
    error = error_of(server.client.get(f"/v1/models/{name}"), 404, "model_not_found")
    assert error["type"] == "not_found_error"
