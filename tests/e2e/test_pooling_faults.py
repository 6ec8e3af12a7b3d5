"""A classifier over real sockets when things go wrong: every request ends once, and the others are served."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from service.engine.pooling.runner import PooledText
from service.settings import Settings
from tests.api.conftest import error_of
from tests.in_process import InProcessServer
from tests.pooling_factory import save_pool_model, tiny_classifier

WAIT_S = 20
BAD = 77  # a token id


class Gate:
    """Stands before the runner: forwards wait while it is closed, and fail if they hold the bad token."""

    def __init__(self, server: InProcessServer) -> None:
        self._runner = server.engine._worker._runner  # type: ignore[attr-defined]
        self._run = self._runner.run
        self._runner.run = self.run
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def run(self, texts: Sequence[PooledText], batch: Any) -> Tensor:
        self.entered.set()
        assert self.open.wait(WAIT_S)
        if any(BAD in text.tokens for text in texts):
            raise RuntimeError("the forward failed, as it was told to")
        answer: Tensor = self._run(texts, batch)
        return answer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcessServer]:
    save_pool_model(tiny_classifier("bert"), "bert", tmp_path / "base")
    settings = Settings(model=str(tmp_path / "base"), data_dir=tmp_path / "data", task="classify", max_queue=3)
    with InProcessServer(settings) as server:
        yield server


def classify(server: InProcessServer, input: Any, **fields: Any) -> Any:
    return server.http.post("/v1/classify", json={"input": input, **fields})


def running(server: InProcessServer) -> int:
    stats = server.engine.stats()
    return stats.waiting + stats.running


def test_a_text_that_cannot_be_read_fails_alone(server: InProcessServer) -> None:
    gate = Gate(server)
    gate.open.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(classify, server, [5])
        assert gate.entered.wait(WAIT_S)
        others = [pool.submit(classify, server, [token]) for token in (6, BAD, 7)]
        while running(server) < 4:
            gate.entered.wait(0.01)
        gate.open.set()
        assert first.result().status_code == 200
        assert [each.result().status_code for each in others] == [200, 500, 200]
    error_of(classify(server, [[5], [BAD]]), 500, "internal_error")
    assert classify(server, [5]).status_code == 200


def test_a_full_queue_refuses_and_a_late_text_times_out(server: InProcessServer) -> None:
    gate = Gate(server)
    gate.open.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(classify, server, [5])
        assert gate.entered.wait(WAIT_S)
        waiting = pool.submit(classify, server, [[6], [7], [8]], timeout_s=1e-6)
        while running(server) < 4:
            gate.entered.wait(0.01)
        refused = classify(server, [9])
        error_of(refused, 429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        gate.open.set()
        assert first.result().status_code == 200
        error_of(waiting.result(), 408, "request_timeout")
    error_of(classify(server, [[5]] * 4), 400, "invalid_request")
    assert running(server) == 0


def test_a_client_that_leaves_is_forgotten(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, noticed, cancel = Gate(server), threading.Event(), server.engine.cancel
    monkeypatch.setattr(server.engine, "cancel", lambda request_id: (cancel(request_id), noticed.set()))
    gate.open.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(classify, server, [5])
        assert gate.entered.wait(WAIT_S)
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as leaving:
            body = b'{"input": [6]}'
            head = [
                "POST /v1/classify HTTP/1.1",
                "Host: x",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
            ]
            leaving.sendall("\r\n".join([*head, "", ""]).encode() + body)
            while running(server) < 2:
                gate.entered.wait(0.01)
        assert noticed.wait(WAIT_S)
        cancelled = 'vblora_finished_choices_total{reason="cancelled"} 1.0'
        gate.open.set()
        assert first.result().status_code == 200
    while running(server):
        gate.entered.wait(0.01)
    assert cancelled in server.http.get("/metrics").text


def test_what_waits_when_the_server_stops_is_told(server: InProcessServer) -> None:
    gate = Gate(server)
    gate.open.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(classify, server, [5])
        assert gate.entered.wait(WAIT_S)
        later = pool.submit(classify, server, [6])
        while running(server) < 2:
            gate.entered.wait(0.01)
        stopping = threading.Thread(target=server.engine.stop)
        stopping.start()
        gate.open.set()
        assert first.result().status_code == 200
        assert later.result().status_code in (200, 500)
        stopping.join(WAIT_S)
    error_of(classify(server, [5]), 503, "engine_unavailable")
