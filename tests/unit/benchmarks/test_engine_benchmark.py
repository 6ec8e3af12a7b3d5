"""The benchmarks run and end in the line of JSON that `docs/benchmarks.md` describes. Nothing here depends on speed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks import blend, engine, families, residency
from benchmarks.report import Target

MACHINE = {"cpu", "cores", "load", "gpu", "torch_threads", "torch", "transformers", "peft", "vblora_serve"}


def last_line(main: Callable[[Sequence[str]], None], output: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(["--quick", "--threads", "1"])
    report: dict[str, Any] = json.loads(output.readouterr().out.splitlines()[-1])
    assert report["machine"].keys() >= MACHINE
    assert report["targets"] == {}, "figures of tiny sizes are judged"
    return report


def test_engine(capsys: pytest.CaptureFixture[str]) -> None:
    report = last_line(engine.main, capsys)
    throughput, decode_step, cold, fairness, fold = (report[name] for name in engine.MEASURES)
    assert throughput["tokens_per_s"].keys() == {"engine", "peft_one_by_one", "peft_by_adapter"}
    assert throughput["over_peft_one_by_one"].keys() == throughput["over_peft_by_adapter"].keys() == {"wall", "cpu"}
    assert throughput["answered_as_peft"] == 1.0
    assert decode_step["over_base"].keys() == decode_step["with_adapters_ms"].keys() == {"1", "4"}
    assert (
        cold["first_token_idle"].keys() == cold["first_token_busy"].keys() == {"cold_ms", "warm_ms", "cold_over_warm"}
    )
    assert cold["longest_gap_cold_ms"] >= cold["median_gap_ms"] > 0
    assert fairness["flooded_over_idle"] > 0
    assert fairness["still_waiting"] >= 0
    assert fold.keys() == {"rows_1", "rows_4"}
    assert fold["rows_4"]["fold_ms"] > 0


def test_blend(capsys: pytest.CaptureFixture[str]) -> None:
    report = last_line(blend.main, capsys)
    for count in (2, 4):
        ways = report[f"adapters_{count}"]
        assert all(way["ms"] > 0 for way in ways.values())
        assert max(ways["per_request"]["relative_error"], ways["stored"]["relative_error"]) < 1e-5
        assert ways["weighted_factors"]["relative_error"] > 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_residency(capsys: pytest.CaptureFixture[str]) -> None:
    report = last_line(residency.main, capsys)
    assert report["adapters"] == 20
    assert report["answered_at_once"] == 4
    assert report["file_bytes"] > 0
    assert {"memory_bytes", "memory_over_file", "register_ms", "answering_grew_bytes"} <= report.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_families(capsys: pytest.CaptureFixture[str]) -> None:
    report = last_line(families.main, capsys)
    private, shared = report["private"], report["shared"]
    assert (report["adapters"], report["answered_at_once"], report["bank_bytes"]) == (40, 4, 4 * 32 * 16)
    saved = report["bank_bytes"] * 19 / 20  # the family has one bank for its twenty adapters
    assert private["disk_bytes"] - shared["disk_bytes"] == pytest.approx(saved, rel=0.01)
    assert private["file_bytes"] == shared["file_bytes"]
    assert report["shared_over_private"]["adapters_per_gb_of_disk"] > 1
    assert {"adapters_per_gb_of_disk_allocated", "adapters_per_gb_of_memory", "register_ms"} <= private.keys()


def test_every_target_names_a_figure_that_full_sizes_report() -> None:
    sizes = engine.EngineSizes()
    assert {str(k) for k in (1, 4, sizes.rows)} == {
        target.figure.split("/")[2] for target in engine.TARGETS if target.figure.startswith("decode_step")
    }
    assert {target.figure.split("/")[0] for target in engine.TARGETS} == set(engine.MEASURES) - {"fold"}


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target("decode_step/over_base/16", at_most=1.1), True),
        (Target("decode_step/over_base/16", at_most=1.05), False),
        (Target("decode_step/over_base/16", at_least=1.05), True),
        (Target("decode_step/over_base/16", at_least=2), False),
    ],
)
def test_a_target_is_judged_by_its_figure(target: Target, met: bool) -> None:
    verdict = target.judge({"decode_step": {"over_base": {"16": 1.08}}})
    assert verdict is not None
    assert (verdict["measured"], verdict["met"]) == (1.08, met)


def test_a_target_whose_figure_was_not_measured_is_left_out() -> None:
    assert Target("throughput/over_peft_one_by_one/wall", at_least=8).judge({"decode_step": {}}) is None
