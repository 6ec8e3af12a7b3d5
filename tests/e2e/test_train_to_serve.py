"""The example of training and serving, run as its README says, in processes of its own against real servers."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.server import ROOT

EXAMPLE = ROOT / "examples" / "train_to_serve"
TIMEOUT_S = 240


@dataclass(frozen=True)
class Run:
    """A folder in which the README's commands were run, and what each printed."""

    folder: Path
    printed: dict[str, str]  # by the script's name

    def adapter(self, name: str, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The config and the tensors of what was written."""
        folder = self.folder / "work" / name / kind
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
        return config, load_file(folder / "adapter_model.safetensors")


def run(command: str, folder: Path) -> str:
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("example")
    (folder / "examples").symlink_to(ROOT / "examples")
    block = (EXAMPLE / "README.md").read_text().split("```sh\n")[1].split("```")[0]
    commands = [line for line in block.splitlines() if not line.startswith("pip install")]
    assert len(commands) == 3
    return Run(folder, {Path(command.split()[1]).stem: run(command, folder) for command in commands})


def test_the_classifier_has_learned(example: Run) -> None:
    """Of sentences that it has not seen, far more are right than by chance."""
    right = re.search(r"(\d+)% of (\d+) held-out", example.printed["train_classifier"])
    assert right is not None
    assert int(right[1]) > 70
    assert int(right[2]) > 50


def test_the_writer_has_learned(example: Run) -> None:
    losses = re.search(r"([\d.]+) before, ([\d.]+) after", example.printed["train_writer"])
    assert losses is not None
    assert float(losses[2]) < 0.9 * float(losses[1])


@pytest.mark.parametrize("name", ["classifier", "writer"])
def test_it_is_saved_to_train_on_and_to_serve(example: Run, name: str) -> None:
    trained_config, trained = example.adapter(name, "trained")
    compact_config, compact = example.adapter(name, "compact")
    assert trained_config["save_only_topk_weights"] is False
    assert compact_config["save_only_topk_weights"] is True
    logits = {key for key in trained if key.endswith(("vblora_logits_A", "vblora_logits_B"))}
    assert logits
    for key in logits:
        best, indices = trained[key].topk(2, dim=-1)
        assert torch.equal(compact[f"{key}_topk_indices"].long(), indices)
        torch.testing.assert_close(compact[f"{key}_topk_weights"], best.softmax(-1)[..., :-1])
    assert not logits & compact.keys()
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in (compact, trained)]
    assert sizes[0] < sizes[1]


def test_both_were_served_and_answered_as_peft_does(example: Run) -> None:
    """The script ends with 1 otherwise: see below."""
    printed = example.printed["serve_and_compare"]
    assert re.search(r"^topics: sha256:[0-9a-f]{64}", printed, re.MULTILINE)
    assert re.search(r"^uploaded +writer +sha256:[0-9a-f]{64}", printed, re.MULTILINE)
    assert len(re.findall(r"^ +(?:memory|speed|safety) [01]\.\d{3}  \S", printed, re.MULTILINE)) == 6
    texts = re.findall(r"^ +(writer|base) +(['\"].*)$", printed, re.MULTILINE)
    assert [who for who, _ in texts] == ["writer", "base"] * 3
    assert all(one != other for (_, one), (_, other) in zip(texts[::2], texts[1::2], strict=True))


def test_training_goes_on_from_the_full_logits(example: Run) -> None:
    """It begins where the first training ended, not anew."""
    first = re.findall(r"loss ([\d.]+)", example.printed["train_classifier"])
    before = example.adapter("classifier", "trained")[1]
    script = "examples/train_to_serve/train_classifier.py"
    resumed = re.findall(r"loss ([\d.]+)", run(f"python {script} --output work --resume --epochs 2", example.folder))
    assert len(resumed) == 2
    assert float(resumed[0]) < 0.5 * float(first[0])
    after = example.adapter("classifier", "trained")[1]
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before if "vblora_logits" in key)


# --- what is compared -----------------------------------------------------------------------------


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(EXAMPLE)
    known = set(sys.modules)
    yield importlib.import_module("serve_and_compare")
    for name in set(sys.modules) - known:  # its neighbours have plain names
        if getattr(sys.modules[name], "__file__", None) and EXAMPLE in Path(str(sys.modules[name].__file__)).parents:
            del sys.modules[name]


def answering(answer: Callable[[Any], Any]) -> httpx.Client:
    """A client of a server that answers so to the JSON that it is sent."""

    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=answer(json.loads(request.content)))

    return httpx.Client(base_url="http://server", transport=httpx.MockTransport(handle))


@pytest.mark.parametrize(
    ("probs", "label", "right"),
    [([0.7, 0.2, 0.1], "memory", True), ([0.69, 0.21, 0.1], "memory", False), ([0.7, 0.2, 0.1], "speed", False)],
)
def test_a_wrong_class_is_noticed(
    comparison: ModuleType, monkeypatch: pytest.MonkeyPatch, probs: list[float], label: str, right: bool
) -> None:
    monkeypatch.setattr(comparison, "pefts_probabilities", lambda adapter, texts: [[0.7, 0.2, 0.1]] * len(texts))
    server = answering(lambda body: {"data": [{"probs": probs, "label": label}] * len(body["input"])})
    if right:
        comparison.compare_classes(server, Path())
        return
    with pytest.raises(SystemExit, match="PEFT answers"):
        comparison.compare_classes(server, Path())


def test_a_wrong_token_is_noticed(comparison: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "pefts_tokens", lambda adapter, prompts: [[1, 2, 3]] * len(prompts))
    right = answering(lambda body: {"choices": [{"text": "", "token_ids": [1, 2, 3]}]})
    comparison.compare_texts(right, Path())
    wrong = answering(lambda body: {"choices": [{"text": "", "token_ids": [1, 2, 4]}]})
    with pytest.raises(SystemExit, match="PEFT writes the tokens"):
        comparison.compare_texts(wrong, Path())


def test_a_refusal_is_told(comparison: ModuleType) -> None:
    refusing = httpx.MockTransport(lambda request: httpx.Response(422, json={"error": {"message": "no such layer"}}))
    with pytest.raises(SystemExit, match="no such layer"):
        comparison.checked(httpx.Client(base_url="http://server", transport=refusing).post("/v1/adapters"))
