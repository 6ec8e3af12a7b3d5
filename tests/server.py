"""A real server in a process of its own, as a user starts it, and a client for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "service" / "demo" / "assets"
STARTUP_S = 120


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """`vblora-serve` with some arguments, ready to answer when `with` begins its block.

    with Server("serve", "--model", str(model), data_dir=tmp_path) as server:
        server.http.get("/v1/models")
    """

    def __init__(self, *arguments: str, data_dir: Path, environ: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.log: list[str] = []
        self._command = [
            sys.executable,
            "-m",
            "service",
            *arguments,
            "--port",
            str(self.port),
            "--data-dir",
            str(data_dir),
        ]
        self._environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environ or {})}
        self._ready = threading.Event()

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(STARTUP_S) or self.process.poll() is not None:
            self.process.kill()
            raise AssertionError("the server did not start:\n" + "".join(self.log))
        return self

    def _read(self) -> None:
        """Collects the log; the line with the server's address says that it listens."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            if self.url in line:
                self._ready.set()
        self._ready.set()  # it ended; __enter__ sees that

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.stop()

    def stop(self) -> int:
        """SIGTERM, as an operator's tools send it; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self._reader.join(10)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def upload(self, name: str, adapter: Path, **query: str) -> httpx.Response:
        return self.http.post("/v1/adapters", params=query, data={"name": name}, files=parts(adapter))

    def generate(self, prompt: str | Sequence[int], **fields: Any) -> dict[str, Any]:
        """A greedy generation; fails on anything but 200."""
        response = self.http.post("/v1/generate", json={"prompt": prompt, "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


def demo_server(data_dir: Path, *options: str) -> Server:
    """The demo's base model with the demo's adapters registered, and more options if given."""
    adapters = [f"--adapter={path.name}={path}" for path in sorted((ASSETS / "adapters").iterdir())]
    base = ("--model", str(ASSETS / "base"), "--served-model-name", "vblora-demo-base")
    return Server("serve", *base, *adapters, *options, data_dir=data_dir)


def parts(adapter: Path) -> dict[str, tuple[str, bytes]]:
    """The multipart parts of an upload."""
    return {
        "config": ("adapter_config.json", (adapter / "adapter_config.json").read_bytes()),
        "weights": ("adapter_model.safetensors", (adapter / "adapter_model.safetensors").read_bytes()),
    }
