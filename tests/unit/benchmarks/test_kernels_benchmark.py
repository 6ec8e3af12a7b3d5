"""The kernels' benchmark on a machine without a GPU, and the floors that docs/performance.md tabulates."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernel_bytes import ADAPTED, BANDWIDTHS, StepBytes
from benchmarks.sizes import AdapterShape

PAGE = Path(__file__).parents[3] / "docs" / "performance.md"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert kernels.main([]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "needs a CUDA device" in report["skipped"]
    assert report["failed"] == []
    assert "layer" not in report


def test_quick_checks_in_the_interpreter(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("triton", reason="Triton is not installed (the extra `kernels`, on Linux)")
    assert kernels.main(["--quick"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["checks"].keys() == set(kernels.QUICK)
    assert all(checked["passed"] for checked in report["checks"].values())


def test_a_failed_check_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(kernels, "check", lambda case, device: {"passed": case is not kernels.CHECKED["plain"]})
    assert kernels.main(["--quick"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["plain"]


def test_bytes_of_a_hand_counted_step():
    """q and v of a 7B model, rank 4, 64 adapters: A and B of two layers 4096 wide are 4 · 4 · 4096 elements."""
    step = StepBytes.of(ADAPTED["q and v"], AdapterShape(), rows=64, adapters=64)
    assert step.gathered == 32 * 64 * (4 * 4 * 4096) * 2
    assert step.selections == 32 * 64 * (4 * 4 * 16) * 2 * (1 + 4)
    assert step.banks_once == 64 * 256 * 256 * 2
    assert step.mixed == 2 * step.gathered
    assert step.base == 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 2


def test_one_bank_for_all_is_read_once():
    shape = AdapterShape()
    own, shared = (StepBytes.of(ADAPTED["all linear"], shape, rows=64, adapters=64, banks=n) for n in (64, 1))
    assert own.banks_once == 64 * shared.banks_once
    assert shared.banks_each_launch == 32 * 8 * shared.banks_once, "every launch names every vector"


def test_the_pages_table_is_computed():
    rows = re.findall(r"^\| (q and v|all linear) \| (\d+) \| (\d+) \|(.+)\|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 8
    for name, num_vectors, banks, cells in rows:
        adapter = AdapterShape(num_vectors=int(num_vectors))
        step = StepBytes.of(ADAPTED[name], adapter, rows=64, adapters=64, banks=int(banks))
        read = (step.gathered, step.selections + step.banks_once, step.selections + step.banks_each_launch)
        expected = [
            f"{size / 1e6:.0f} MB: {' / '.join(f'{1e6 * size / speed:.0f}' for speed in BANDWIDTHS.values())} µs"
            for size in read
        ]
        assert [cell.strip() for cell in cells.split("|")] == expected
