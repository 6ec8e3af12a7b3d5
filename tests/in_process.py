"""A whole server within the test's own process, over real sockets: its parts can be watched, and made to fail."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import httpx
import uvicorn

from adapters.registry import AdapterRegistry
from service.app import create_app
from service.assembly import build_server
from service.commands.serve import DrainingServer, listening, url_of
from service.engine.engine import BatchEngine
from service.engine.model_runner import ModelRunner
from service.settings import Settings

STARTUP_S = 60
SHUTDOWN_S = 5  # a failed test may leave a connection that nobody reads from


class InProcessServer:
    """What `vblora-serve serve` runs, on a thread.

    with InProcessServer(Settings(model=…, data_dir=…)) as server:
        server.http.get("/v1/models")
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opened = ExitStack()
        self._listens = threading.Event()

    def __enter__(self) -> InProcessServer:
        with ExitStack() as opened:
            listener = opened.enter_context(listening("127.0.0.1", 0))
            self.url = url_of(listener)
            server = build_server(self._settings)
            opened.callback(server.close)
            assert isinstance(server.engine, BatchEngine)
            self.engine: BatchEngine = server.engine
            self.registry: AdapterRegistry = server.state.registry
            config = uvicorn.Config(
                create_app(server.state), log_config=None, access_log=False, timeout_graceful_shutdown=SHUTDOWN_S
            )
            web = DrainingServer(config, server.engine, self._settings.drain_timeout_s, self._listens.set)
            thread = threading.Thread(target=web.run, args=([listener],), name="test-server")
            thread.start()
            opened.callback(thread.join)
            opened.callback(setattr, web, "should_exit", True)
            self.http: httpx.Client = opened.enter_context(httpx.Client(base_url=self.url, timeout=60))
            assert self._listens.wait(STARTUP_S)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    @property
    def runner(self) -> ModelRunner:
        return self.engine._worker._runner

    def generate(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """A greedy generation; fails on anything but 200."""
        response = self.http.post("/v1/generate", json={"prompt": prompt, "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer
