"""The benchmarks run and end in the line of JSON that `docs/benchmarks.md` describes. Nothing here depends on speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

MACHINE = {"cpu", "cores", "load", "gpu", "torch_threads", "torch", "transformers", "peft", "vblora_serve"}


def last_line(benchmark: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--quick", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["benchmark"] == benchmark
    assert report["machine"].keys() >= MACHINE
    assert report["targets"] == {}, "figures of tiny sizes are judged"
    return report


def test_engine() -> None:
    report = last_line("engine")
    throughput = report["throughput"]
    assert throughput["tokens_per_s"].keys() == {"engine", "peft_one_by_one", "peft_by_adapter"}
    assert throughput["over_peft_one_by_one"].keys() == throughput["over_peft_by_adapter"].keys() == {"wall", "cpu"}
    assert throughput["answered_as_peft"] == 1.0
    decode_step = report["decode_step"]
    assert decode_step["over_base"].keys() == decode_step["with_adapters_ms"].keys() == {"1", "4"}
    cold = report["cold_adapter"]
    assert cold["first_token_idle"].keys() == cold["first_token_busy"].keys()
    assert cold["longest_gap_cold_ms"] >= cold["median_gap_ms"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_residency() -> None:
    report = last_line("residency")
    assert report["adapters"] == 20
    assert report["answered_at_once"] == 4
    assert report["memory_over_file"] == pytest.approx(report["memory_bytes"] / report["file_bytes"], rel=0.01)


def test_a_target_is_judged_by_its_figure() -> None:
    from benchmarks.report import Target

    figures = {"decode_step": {"over_base": {"16": 1.08}}}
    assert Target("decode_step/over_base/16", at_most=1.1).judge(figures) == {
        "at_most": 1.1,
        "measured": 1.08,
        "met": True,
    }
    assert Target("decode_step/over_base/16", at_least=2).judge(figures) == {
        "at_least": 2,
        "measured": 1.08,
        "met": False,
    }
    assert Target("throughput/ratio", at_least=2).judge(figures) is None
