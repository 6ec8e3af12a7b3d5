"""The benchmark of replayed steps on a machine without a GPU: that it runs, that it can fail, and what it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode_graphs, graph_checks
from service.engine.graphs.capture import Recorded, Step

ROOT = Path(__file__).parents[3]
# What this project needs besides, and these do not bring along.
OTHERS = (
    "peft",
    "fastapi",
    "uvicorn",
    "pydantic",
    "prometheus_client",
    "multipart",
    "llguidance",
    "hypothesis",
    "pytest",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_graphs.main([]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "needs a CUDA device" in report["skipped"]
    assert "steps" not in report


def test_quick_runs_all_of_it_and_needs_no_other_packages() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({OTHERS!r}))"
    run = subprocess.run(
        [sys.executable, "-c", f"{blocked}; from benchmarks.decode_graphs import main; sys.exit(main(['--quick']))"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    for checked in report["tokens"]["float32"].values():
        assert checked["same"] == checked["requests"] == 6
        assert checked["captured_later"] == 0 < checked["captured"]
    assert set(report["steps"]) == {"rows_1", "rows_4"}
    for figures in report["steps"].values():
        assert figures["base_us"] > 0
        assert figures["base_share_of_floor"] is None, "of no known card"
    assert report["resident"]["adapters"] == 20
    assert report["resident"]["evicted"] == 0
    assert report["faster_pair"] in ("bank_direct", "gathered")
    assert set(report["cold_adapter"]) == {"compose_ms", "fill_slot_ms"}


class Late(Recorded):
    """Captures everything twice, once when it is replayed."""

    def capture(self, step: Step) -> Step:
        replay = super().capture(step)

        def again() -> None:
            self.captures += 1
            replay()

        return again


@pytest.mark.parametrize("fault", ["captures", "tokens"])
def test_a_failed_check_is_named(fault: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if fault == "captures":
        monkeypatch.setattr(decode_graphs, "Recorded", Late)
    else:
        answers = graph_checks._answers

        def wrong(*arguments: Any) -> Any:
            tokens, counted = answers(*arguments)
            return ({name: [0] for name in tokens} if arguments[-1] else tokens), counted

        monkeypatch.setattr(graph_checks, "_answers", wrong)
    assert decode_graphs.main(["--quick", "--checks"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["failed"] == ["float32, bank-direct", "float32, gathered"]
