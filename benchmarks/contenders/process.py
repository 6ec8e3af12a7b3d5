"""A contender in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from types import TracebackType

import httpx

from tests.server import ROOT, free_port

_STARTUP_S = 300.0
_ENDING_S = 30.0


class Contender:
    """One of the apps beside this module. It loads while others do, and answers after `wait`.

    with Contender("peft_app", "--base", …) as app:
        app.wait()
        Endpoint(app.port)
    """

    def __init__(self, app: str, *arguments: str) -> None:
        self.port = free_port()
        self._command = [sys.executable, "-m", f"benchmarks.contenders.{app}", *arguments, "--port", f"{self.port}"]

    def __enter__(self) -> Contender:
        self._output = tempfile.TemporaryFile("w+")
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # as `tests.server.Server` has it
        self.process = subprocess.Popen(
            self._command, cwd=ROOT, env=environ, stdout=self._output, stderr=subprocess.STDOUT
        )
        return self

    def wait(self) -> None:
        deadline = time.monotonic() + _STARTUP_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._output.seek(0)
                raise RuntimeError(f"{self._command[2]} did not start:\n{self._output.read()}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/healthz", trust_env=False).is_success
        except httpx.TransportError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._output.close()
