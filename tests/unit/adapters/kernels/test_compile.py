"""What the interpreter runs is also what Triton's compiler takes, which minds types that NumPy does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


def test_the_kernels_compile_for_hopper(tmp_path: Path):
    pytest.importorskip("triton", reason="Triton is not installed (the extra `kernels`, on Linux)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.adapters.kernels.compile_kernels"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 12
