"""Liveness, readiness, metrics and versions."""

from __future__ import annotations

import pytest

from service import __version__
from service.engine.seam import EngineState
from tests.api.conftest import BASE, Server, error_of


def test_the_process_is_alive_until_its_engine_has_died(server: Server) -> None:
    for state in set(EngineState) - {EngineState.DEAD}:
        server.engine.state = state
        response = server.client.get("/healthz")
        assert (response.status_code, response.json()) == (200, {"status": "ok"})
    server.engine.state = EngineState.DEAD
    assert "restart" in error_of(server.client.get("/healthz"), 503, "engine_unavailable")["message"]


def test_a_ready_engine_is_ready(server: Server) -> None:
    response = server.client.get("/readyz")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_may_ask_for_the_head_alone(server: Server, path: str) -> None:
    assert server.client.head(path).status_code == 200
    server.engine.state = EngineState.DEAD
    assert server.client.head(path).status_code == 503


@pytest.mark.parametrize("state", [state for state in EngineState if state is not EngineState.READY])
def test_every_other_state_is_503_and_says_why(server: Server, state: EngineState) -> None:
    server.engine.state = state
    assert error_of(server.client.get("/readyz"), 503, "engine_unavailable")["type"] == "server_error"


def test_metrics_are_rendered_as_they_are(server: Server) -> None:
    response = server.client.get("/metrics")
    content, content_type = server.metrics.render(None)
    assert (response.content, response.headers["content-type"]) == (content, content_type)


def test_versions_name_what_runs(server: Server) -> None:
    versions = server.client.get("/version").json()
    assert versions["version"] == __version__
    assert (versions["model"], versions["dtype"], versions["kv_backend"]) == (BASE, "float32", "slot")
    assert (versions["quantization"], versions["weight_bytes"]) == (None, 49380)
    assert versions["task"] == "generate"
    assert all(versions[part] for part in ("python", "torch", "transformers", "device", "fingerprint"))
