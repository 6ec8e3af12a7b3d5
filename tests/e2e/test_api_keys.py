"""API keys as an operator handles them: made on the command line, read at start, read anew on SIGHUP."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.server import ROOT, Server, parts


def make_key(file: Path, *attributes: str) -> str:
    command = [sys.executable, "-m", "service", "key", "--file", str(file), *attributes]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def until(condition: Callable[[], bool]) -> None:
    """Asks the server again and again, which takes its time."""
    for _ in range(10_000):
        if condition():
            return
    raise AssertionError("it never came true")


def test_keys_are_read_at_start_and_anew_on_sighup(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_model(model, tmp_path / "base")
    adapter = make_adapter(model, AdapterSpec(seed=1), tmp_path / "adapter")
    file = tmp_path / "keys"
    acme = make_key(file, "--tenant", "acme", "--name", "of-acme")
    with Server(
        "serve", "--model", str(tmp_path / "base"), "--api-key-file", str(file), data_dir=tmp_path / "data"
    ) as server:

        def status(key: str) -> int:
            return server.http.get("/v1/adapters", headers={"Authorization": f"Bearer {key}"}).status_code

        assert status(acme) == 200
        assert server.http.get("/v1/adapters").status_code == 401
        assert server.http.get("/healthz").status_code == 200
        headers = {"Authorization": f"Bearer {acme}"}
        uploaded = server.http.post("/v1/adapters", data={"name": "mine"}, files=parts(adapter), headers=headers)
        assert uploaded.status_code == 201

        rival = make_key(file, "--tenant", "rival")
        assert status(rival) == 401, "not before it is told"
        server.process.send_signal(signal.SIGHUP)
        until(lambda: status(rival) == 200)
        assert status(acme) == 200
        of_rival = {"Authorization": f"Bearer {rival}"}
        assert server.http.get("/v1/adapters", headers=of_rival).json()["data"] == []
        assert server.http.get("/v1/adapters/mine", headers=of_rival).status_code == 404

        good = file.read_text()
        file.write_text(good + "sha256:broken\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: status(rival) == 200 and any("stay as they are" in line for line in server.log))
        file.write_text(good.splitlines()[1] + "\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: status(acme) == 401)
        assert status(rival) == 200
        assert server.stop() == 0
    log = "".join(server.log)
    assert "key=of-acme" in log
    assert acme not in log
    assert rival not in log


def test_sighup_while_the_model_loads_is_heeded_once_it_serves(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path / "base")
    file = tmp_path / "keys"
    make_key(file)
    command = ("serve", "--model", str(tmp_path / "base"), "--api-key-file", str(file))
    server = Server(*command, data_dir=tmp_path / "data")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(server.__enter__)
        while not server.log:  # its first words come before it loads anything
            assert not starting.done(), starting.result()
        server.process.send_signal(signal.SIGHUP)
        starting.result()
    with contextlib.closing(server.http):
        assert server.stop() == 0
    assert any("read the API keys anew" in line for line in server.log)


@pytest.mark.parametrize("text", ["", "sha256:12 tenant=acme\n"])
def test_a_key_file_that_says_nothing_starts_no_server(text: str, tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path / "base")
    (tmp_path / "keys").write_text(text)
    command = [sys.executable, "-m", "service", "serve", "--model", str(tmp_path / "base"), "--port", "0"]
    command += ["--data-dir", str(tmp_path / "data"), "--api-key-file", str(tmp_path / "keys")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "API key file" in done.stderr
