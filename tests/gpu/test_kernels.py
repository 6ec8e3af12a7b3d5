"""On a GPU: both pairs of kernels, compiled, against float64, and replayed from captured graphs."""

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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_equal_the_reference():
    """In a process of its own: in this one, Triton interprets (tests/conftest.py)."""
    pytest.importorskip("triton", reason="Triton is not installed (the extra `kernels`, on Linux)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--checks"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode in (0, 1), run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["failed"] == [], report
    assert report["checks"]
    assert report["replay"] == {"bank_direct": True, "gathered": True}
