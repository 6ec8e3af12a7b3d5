"""A server over a quantized base: what it says of itself, what it refuses, and a receipt that PEFT recomputes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.cli import main
from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.server import ROOT, Server

pytest.importorskip("torchao")


@dataclass(frozen=True)
class Case:
    server: Server
    folder: Path
    parameters: int


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("quantized")
    model = tiny_model("qwen2")
    save_model(model, folder / "base")
    names = ("one", "two")
    adapters = [
        f"--adapter={name}={make_adapter(model, AdapterSpec(seed=seed), folder / name)}"
        for seed, name in enumerate(names, start=1)
    ]
    arguments = ["serve", "--model", str(folder / "base"), "--quantization", "int8", *adapters]
    with Server(*arguments, data_dir=folder / "data") as server:
        yield Case(server, folder, sum(parameter.numel() for parameter in model.parameters()))


def test_it_says_how_the_base_is_held(case: Case) -> None:
    versions = case.server.http.get("/version").json()
    assert (versions["quantization"], versions["dtype"]) == ("int8", "float32")
    assert case.parameters < versions["weight_bytes"] < 3 * case.parameters, "4 bytes each unquantized"
    assert case.server.http.get("/v1/parameters").json()["base"]["total_params"] == case.parameters
    assert any("quantization=int8" in line for line in case.server.log)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("selection", [{"adapter": "one"}, {"adapters": [{"name": "one"}, {"name": "two"}]}])
def test_a_receipt_replays(case: Case, capsys: pytest.CaptureFixture[str], selection: dict[str, object]) -> None:
    answer = case.server.generate("The quick brown fox", max_new_tokens=12, receipt="full", **selection)
    assert answer["receipt"]["base"]["quantization"] == "int8"
    (case.folder / "answer.json").write_text(json.dumps(answer))
    names = [adapter["name"] for adapter in answer["selection"]["adapters"]]
    adapters = [f"--adapter={name}={case.folder / name}" for name in names]
    code = main(["replay", str(case.folder / "answer.json"), "--model", str(case.folder / "base"), *adapters, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0, report
    assert report["choices"][0]["tokens"] == 12


def test_merging_is_refused(case: Case) -> None:
    refused = case.server.http.post("/v1/generate", json={"prompt": "x", "adapter": "one", "mode": "merge"})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "merge_unsupported"


def test_auto_merge_is_refused_at_start(case: Case, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service", "serve", "--model", str(case.folder / "base"), "--port", "0"]
    options = ["--quantization", "int8", "--auto-merge", "--data-dir", str(tmp_path)]
    ended = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert "auto_merge folds adapters into the base model's weights, which are quantized (int8)" in ended.stderr
