"""A quantized base: merging is refused wherever it can be asked for, and the answers say how the base is held."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.engine.selection import Mode
from tests.api.conftest import Server, error_of


@pytest.fixture
def server(server: Server) -> Server:
    """Its base is quantized, and it has the adapters `sql` and `style`."""
    server.state = replace(server.state, base=replace(server.state.base, quantization="nf4"))
    server.app.state.server = server.state
    server.upload("sql", "one")
    server.upload("style", "two")
    return server


def check_refused(response: Any) -> None:
    error = error_of(response, 400, "merge_unsupported")
    assert error["param"] == "mode"
    assert "quantized (nf4)" in error["message"]
    assert "'switch'" in error["message"]


@pytest.mark.parametrize("selection", [{"adapter": "sql"}, {"adapters": [{"name": "sql", "weight": 0.5}]}, {}])
def test_a_request_that_wants_to_merge_is_refused(server: Server, selection: dict[str, Any]) -> None:
    check_refused(server.generate(**selection, mode="merge"))
    assert server.generate(**selection, mode="switch").status_code == 200
    assert server.generate(**selection).json()["selection"]["mode"] == "switch"


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_openais_routes_refuse_it_too(server: Server, route: str) -> None:
    body = {"model": "sql:0.7+style:0.3", "mode": "merge", "prompt": "hi"}
    if route == "chat/completions":
        body = {**body, "messages": [{"role": "user", "content": "hi"}]}
        del body["prompt"]
    check_refused(server.client.post(f"/v1/{route}", json=body))


def test_activation_with_merge_is_refused_and_changes_nothing(server: Server) -> None:
    server.client.post("/v1/adapters/style/activate")
    check_refused(server.client.post("/v1/adapters/sql/activate", json={"mode": "merge"}))
    active = server.store.active("")
    assert active is not None
    assert (active.name, active.mode) == ("style", "switch")
    assert server.engine.folded == []


def test_an_upload_that_is_to_be_merged_is_refused_before_it_is_registered(server: Server) -> None:
    check_refused(server.upload("third", "logits", activate="merge"))
    assert server.client.get("/v1/adapters/third").status_code == 404
    assert server.upload("third", "logits", activate="switch").status_code == 201


def test_an_older_activation_with_merge_runs_beside_the_base(server: Server) -> None:
    """The data directory may have served the same base unquantized before."""
    server.store.activate("", "sql", Mode.MERGE)
    answer = server.generate()
    assert answer.json()["selection"]["mode"] == "switch"
    assert answer.headers["x-adapter-digest"] == server.digest("sql")


def test_versions_and_receipts_say_so(server: Server) -> None:
    assert server.client.get("/version").json()["quantization"] == "nf4"
    assert server.generate(receipt=True).json()["receipt"]["base"]["quantization"] == "nf4"
