"""An encoder-decoder as a user starts it: adapters from the command line, many clients at once, and the wrong task."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.factories import save_model, tiny_model
from tests.seq2seq_factory import (
    Seq2SeqSpec,
    ending_tokenizer,
    make_seq2seq_adapter,
    peft_generated,
    peft_loaded,
    save_seq2seq,
    shared_model,
)
from tests.server import ROOT, Server

MODEL = shared_model("t5-gated")
NAMES = ("one", "two", "three", "four")
TOKENS = 10


@dataclass(frozen=True)
class Case:
    server: Server
    folder: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("seq2seq")
    save_seq2seq(MODEL, folder / "base")
    adapters = []
    for seed, name in enumerate(NAMES):
        path = make_seq2seq_adapter(MODEL, Seq2SeqSpec(compact=seed % 2 == 0, seed=seed), folder / name)
        adapters.append(f"--adapter={name}={path}")
    arguments = ["serve", "--model", str(folder / "base"), "--task", "seq2seq", "--max-batch-size", "4", *adapters]
    with Server(*arguments, data_dir=folder / "data") as server:
        yield Case(server, folder)


def test_the_log_shows_how_to_ask(case: Case) -> None:
    pause, until = threading.Event(), time.monotonic() + 20
    while f"{case.server.url}/v1/generate" not in (log := "".join(case.server.log)):  # the last that it says
        assert time.monotonic() < until, log
        pause.wait(0.01)
    assert "summarize" in log


def test_many_clients_at_once_get_what_peft_says(case: Case) -> None:
    """Streams and whole answers, on both routes, of all adapters and the base."""
    tokenizer = ending_tokenizer()
    cases = [(name, f"{'word ' * (i % 7)}number {i}") for i in range(6) for name in (*NAMES, "base")]
    loaded = {name: peft_loaded(MODEL, case.folder / name if name != "base" else None) for name in (*NAMES, "base")}

    def ask(i: int) -> str:
        name, prompt = cases[i]
        if i % 2:
            body = {"prompt": prompt, "model": name, "temperature": 0, "max_tokens": TOKENS, "stream": i % 4 == 1}
            response = case.server.http.post("/v1/completions", json=body)
        else:
            body = {"prompt": prompt, "adapter": name, "temperature": 0, "max_new_tokens": TOKENS, "stream": i % 4 == 0}
            response = case.server.http.post("/v1/generate", json=body)
        assert response.status_code == 200, response.text
        if not body["stream"]:
            return str(response.json()["choices"][0]["text"])
        frames = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        assert frames.pop() == "[DONE]"
        return "".join(choice["text"] for frame in frames for choice in json.loads(frame)["choices"])

    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(ask, range(len(cases))))
    for (name, prompt), answer in zip(cases, answers, strict=True):
        ids = peft_generated(loaded[name], tokenizer(prompt)["input_ids"], TOKENS)
        assert answer == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    metrics = case.server.http.get("/metrics").text
    assert "vblora_kv_bytes 0.0" in metrics


@pytest.mark.parametrize(("kind", "task", "hint"), [("t5", "generate", "seq2seq"), ("llama", "seq2seq", "generate")])
def test_a_base_of_the_other_kind_is_refused_at_start(kind: str, task: str, hint: str, tmp_path: Path) -> None:
    if kind == "t5":
        save_seq2seq(MODEL, tmp_path / "base")
    else:
        save_model(tiny_model("llama"), tmp_path / "base")
    command = [
        sys.executable,
        "-m",
        "service",
        "serve",
        "--model",
        str(tmp_path / "base"),
        "--task",
        task,
        "--port",
        "0",
    ]
    ended = subprocess.run(
        [*command, "--data-dir", str(tmp_path / "data")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode != 0
    assert f"start the server with --task {hint}" in ended.stderr
