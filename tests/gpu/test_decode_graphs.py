"""On a GPU: an engine whose decode steps replay from CUDA graphs answers what one without them does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_steps_answer_as_eager_ones_and_are_never_captured_again():
    """In a process of its own: in this one, Triton interprets (tests/conftest.py)."""
    pytest.importorskip("triton", reason="Triton is not installed (the extra `kernels`, on Linux)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.decode_graphs", "--checks"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert run.returncode in (0, 1), run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["failed"] == [], report
    for by_kernels in report["tokens"].values():
        for checked in by_kernels.values():
            assert checked["captured_later"] == 0
            assert checked["replayed"] > 100
            assert checked["same"] > checked["requests"] // 2
