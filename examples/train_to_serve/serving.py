"""A server for as long as a block lasts, and a client of it."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

STARTS_WITHIN_S = 120

_started: dict[str, subprocess.Popen[bytes]] = {}


@contextmanager
def running_server(*arguments: str, log: Path) -> Iterator[str]:
    """Starts `vblora-serve serve` with these arguments; its address. It may not answer yet: see `client_of`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "service", "serve", *arguments, "--port", str(port)]
    with log.open("w") as written, subprocess.Popen(command, stdout=written, stderr=written) as process:
        url = f"http://127.0.0.1:{port}"
        _started[url] = process
        try:
            yield url
        finally:
            process.terminate()


def client_of(url: str) -> httpx.Client:
    """A client of a server, once that is ready."""
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz").is_success:
                return httpx.Client(base_url=url, timeout=60)
        if url in _started and _started[url].poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit(f"{url} does not become ready: see its log")


def checked(response: httpx.Response) -> dict:
    """The JSON of a success. A refusal says what is wrong, and what to do."""
    if not response.is_success:
        raise SystemExit(f"{response.request.method} {response.request.url}: {response.text}")
    return response.json()
