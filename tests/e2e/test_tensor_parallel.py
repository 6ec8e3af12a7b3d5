"""`serve --tensor-parallel 2` as a user starts it, and how its processes end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.server import ROOT, Server

WAIT_S = 60
PROMPT = "how a text goes on that is longer than a block of the prefix cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensor-parallel")
    model = tiny_model("llama")
    save_model(model, folder / "base")
    make_adapter(model, AdapterSpec(target_modules="all-linear"), folder / "adapter")
    save_model(tiny_model("gpt2"), folder / "gpt2")
    return folder


def server(folder: Path, data: Path, *more: str) -> Server:
    adapter = f"mine={folder / 'adapter'}"
    return Server("serve", "--model", str(folder / "base"), "--adapter", adapter, *more, data_dir=data)


def children(pid: int) -> list[int]:
    """The processes that a server has started with parts of the model."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and "spawn_main" in (each / "cmdline").read_text():
                found.append(int(each.name))
        except OSError:
            continue
    return found


def until(holds: Callable[[], bool]) -> None:
    """Asks again until it holds."""
    again = threading.Event()
    for _ in range(WAIT_S * 10):
        if holds():
            return
        again.wait(0.1)
    raise AssertionError("it did not come to hold")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads processes from /proc")


def test_serves_as_one_process_does_and_ends_in_order(folder: Path, tmp_path: Path) -> None:
    with server(folder, tmp_path / "one") as one:
        expected = [one.generate(PROMPT, adapter=name)["choices"] for name in ("mine", "base")]
        facts = one.http.get("/version").json()
    with server(folder, tmp_path / "two", "--tensor-parallel", "2") as two:
        for name, answer in zip(("mine", "base", "mine"), [*expected, expected[0]], strict=True):
            assert two.generate(PROMPT, adapter=name)["choices"] == answer
        uploaded = two.upload("later", folder / "adapter")
        assert uploaded.status_code == 201, uploaded.text
        assert two.generate(PROMPT, adapter="later")["choices"] == expected[0]
        assert two.http.get("/version").json()["fingerprint"] == facts["fingerprint"], "the whole model's"
        for refused in (
            two.http.post("/v1/adapters/mine/activate", json={"mode": "merge"}),
            two.http.post("/v1/generate", json={"prompt": PROMPT, "adapter": "mine", "mode": "merge"}),
        ):
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "merge_unsupported"
            assert "held in 2 parts" in refused.json()["error"]["message"]
        (part,) = children(two.process.pid)
        os.kill(part, signal.SIGTERM)  # as a service manager sends it to all: it goes on until the server ends
        os.kill(part, signal.SIGINT)
        assert two.generate(PROMPT, adapter="mine")["choices"] == expected[0]
        assert two.stop() == 0
        until(lambda: not is_alive(part))


def test_a_part_that_is_killed_ends_what_runs_and_the_server_says_so(folder: Path, tmp_path: Path) -> None:
    with server(folder, tmp_path / "data", "--tensor-parallel", "2") as running:
        (part,) = children(running.process.pid)
        os.kill(part, signal.SIGKILL)
        until(lambda: running.http.get("/healthz").status_code == 503)
        answer = running.http.post("/v1/generate", json={"prompt": PROMPT})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_unavailable"
        assert running.stop() == 0
        assert any("vblora-shard-1, which held a part of the model, has ended" in line for line in running.log)


def test_no_part_outlives_a_server_that_is_killed(folder: Path, tmp_path: Path) -> None:
    with server(folder, tmp_path / "data", "--tensor-parallel", "2") as running:
        parts = children(running.process.pid)
        assert len(parts) == 1
        running.kill()
        until(lambda: not any(map(is_alive, parts)))


def test_what_cannot_be_cut_is_refused_at_start(folder: Path, tmp_path: Path) -> None:
    options = ("--model", str(folder / "gpt2"), "--tensor-parallel", "2", "--port", "0", "--data-dir", str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-m", "service", "serve", *options],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "gpt2 models have no plan for tensor parallelism" in ended.stderr
