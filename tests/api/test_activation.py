"""Which adapter answers by default, and which version of it."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.errors import UnsupportedCheckpoint
from service.engine.errors import EngineUnavailable
from service.engine.selection import Mode, SelectedAdapter, Selection
from tests.api.conftest import Server, error_of


@pytest.fixture
def server(server: Server) -> Server:
    """With the adapters `sql` and `style`."""
    server.upload("sql", "one")
    server.upload("style", "two")
    return server


def activate(server: Server, name: str, body: Any = None) -> Any:
    return server.client.post(f"/v1/adapters/{name}/activate", json=body)


@pytest.mark.parametrize("body", [None, {}, {"mode": "switch"}])
def test_switch_is_the_default(server: Server, body: Any) -> None:
    shown = activate(server, "sql", body).json()
    assert (shown["active"], shown["mode"]) == (True, "switch")
    assert "merge_error" not in shown
    assert server.engine.folded == []
    assert shown == server.client.get("/v1/adapters").json()["data"][0]


def test_merge_folds_and_says_what_it_cost(server: Server) -> None:
    shown = activate(server, "sql", {"mode": "merge"}).json()
    assert (shown["active"], shown["mode"]) == (True, "merge")
    assert shown["merge_error"] == 0.25
    assert shown["merge_error_layer"] == "model.layers.0.self_attn.q_proj"
    adapter = SelectedAdapter("sql", server.digest("sql"))
    assert server.engine.folded == [Selection((adapter,), Mode.MERGE)]


def test_a_fold_that_has_to_wait_does_not_hold_the_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.activation.FOLD_WAIT_S", 0.01)
    server.engine.fold_never_comes = True
    shown = activate(server, "sql", {"mode": "merge"}).json()
    assert (shown["active"], shown["mode"], shown["merge_error"]) == (True, "merge", None)


@pytest.mark.parametrize(
    ("error", "status"),
    [(UnsupportedCheckpoint("the base is quantized"), 415), (EngineUnavailable("draining"), 503)],
)
@pytest.mark.parametrize("before", [None, "style"])
def test_a_refused_fold_activates_nothing(server: Server, error: Exception, status: int, before: str | None) -> None:
    if before is not None:
        activate(server, before)
    active = server.store.active("")
    server.engine.fold_error = error
    assert activate(server, "sql", {"mode": "merge"}).status_code == status
    assert server.store.active("") == active


@pytest.mark.parametrize(("body", "param"), [({"mode": "fold"}, "mode"), ({"modus": "merge"}, "modus"), ([], None)])
def test_the_body_is_checked(server: Server, body: Any, param: str | None) -> None:
    assert error_of(activate(server, "sql", body), 400, "invalid_request")["param"] == param


def test_one_adapter_is_active_at_a_time(server: Server) -> None:
    activate(server, "sql")
    activate(server, "style")
    data = server.client.get("/v1/adapters").json()["data"]
    assert [(adapter["name"], adapter["active"]) for adapter in data] == [("sql", False), ("style", True)]


def test_only_the_active_adapter_is_deactivated(server: Server) -> None:
    activate(server, "sql")
    assert server.client.post("/v1/adapters/style/deactivate").status_code == 200
    assert server.generate().headers["x-adapter-digest"] == server.digest("sql")
    shown = server.client.post("/v1/adapters/sql/deactivate").json()
    assert (shown["active"], shown["mode"]) == (False, None)
    assert server.generate().headers["x-adapter-digest"] == "base"


def test_rollback_makes_an_earlier_version_current(server: Server) -> None:
    first = server.digest("sql")
    server.upload("sql", "logits", query="?replace=true")
    second = server.digest("sql")
    activate(server, "sql")
    shown = server.client.post("/v1/adapters/sql/rollback", json={"digest": first[:15]}).json()
    assert (shown["digest"], shown["active"], shown["storage"]) == (first, True, "topk")
    assert server.generate().headers["x-adapter-digest"] == first
    versions = server.client.get("/v1/adapters/sql").json()["versions"]
    assert [(version["digest"], version["current"]) for version in versions] == [(second, False), (first, True)]
    assert server.generate(adapter=f"sql@{second[:20]}").headers["x-adapter-digest"] == second


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"digest": "sha256:00000000"}, 404, "adapter_not_found"),
        ({"digest": "00000000"}, 400, "invalid_request"),
        ({"digest": "sha256:"}, 400, "invalid_request"),
        ({}, 400, "invalid_request"),
        ({"digest": 5}, 400, "invalid_request"),
    ],
)
def test_rollback_needs_a_version_that_exists(server: Server, body: Any, status: int, code: str) -> None:
    error_of(server.client.post("/v1/adapters/sql/rollback", json=body), status, code)
