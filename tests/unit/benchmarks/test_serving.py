"""The servers meet at a tiny size, answer alike, and the benchmark ends in its line of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import serving
from benchmarks.contenders.lineup import agreed
from benchmarks.floor import Floor
from benchmarks.load.streams import Latencies, Stream
from benchmarks.plot import line_plot
from benchmarks.sizes import QUICK_SERVING, ServingSizes
from benchmarks.workload import greedy_request
from service.commands.bench_plan import arrivals
from service.engine.selection import Selection

LATENCIES = set(Latencies.__dataclass_fields__)
RATIOS = {"throughput", "first_token_p50", "first_token_p99", "inter_token_p50"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_serving(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    serving.main(["--quick", "--threads", "1", "--plot", str(tmp_path / "plots")])
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["targets"] == {}, "figures of tiny sizes are judged"
    peft = {"peft_switching", "peft_grouped"}
    assert_compared(report["closed_loop"], peft)
    assert_compared(report["one_adapter"], {"transformers_continuous"})
    assert report["open_loop"].keys() == {"20", "40"}
    for at_rate in report["open_loop"].values():
        assert_compared(at_rate, peft)
    assert report["http_over_engine"].keys() == {"http", "engine", "floor", "wall"}
    assert report["step_growth"]["step_ms"].keys() == {"1", "4"}
    assert report["step_growth"]["over_one"].keys() == {"4"}
    assert report["memory"]["server_bytes"].keys() == report["memory"]["floor_bytes"].keys() == {"1", "3"}
    assert report["memory"]["peft_bytes"]["1"] > report["memory"]["file_bytes"] > 0
    assert report["machine_floor"]["gigabytes_per_s"] > 0
    for plot in ("open_loop", "memory"):
        ElementTree.parse(tmp_path / "plots" / f"{plot}.svg")


def assert_compared(figures: dict[str, Any], others: set[str]) -> None:
    assert figures["agreed"] == 1.0
    assert figures["contenders"].keys() == {"server", *others}
    assert all(latencies.keys() == LATENCIES for latencies in figures["contenders"].values())
    assert all(figures[f"over_{name}"].keys() == RATIOS for name in others)
    assert figures["floor"]["rows_1"].keys() == {"tokens_per_s", "first_token_ms", "inter_token_ms"}


def test_every_target_names_a_figure_that_full_sizes_report() -> None:
    assert {target.figure.split("/")[0] for target in serving.TARGETS} <= set(serving.MEASURES)
    assert f"step_growth/over_one/{ServingSizes().step_adapters[-1]}" in {t.figure for t in serving.TARGETS}


def test_a_seed_draws_one_pattern_of_arrivals_for_every_rate() -> None:
    slow, fast = arrivals(50, 1.0, seed=3), arrivals(50, 4.0, seed=3)
    assert slow == sorted(slow)
    assert [4 * at for at in fast] == pytest.approx(slow)
    assert arrivals(50, 1.0, seed=4) != slow


def test_latencies_are_those_of_the_streams() -> None:
    streams = {"a": Stream(0.0, (1, 2, 3), (0.1, 0.2, 0.4)), "b": Stream(0.5, (4,), (1.0,))}
    seen = Latencies.of(streams)
    assert seen.tokens_per_s == pytest.approx(4.0)
    assert (seen.first_token_p50_ms, seen.first_token_p99_ms) == pytest.approx((500.0, 500.0))
    assert seen.inter_token_p99_ms == pytest.approx(200.0)


def test_contenders_agree_on_the_requests_that_all_answer_alike() -> None:
    ours = {"a": Stream(0.0, (1, 2), (0.1, 0.2)), "b": Stream(0.0, (3,), (0.1,))}
    theirs = {"a": Stream(0.0, (1, 2), (5.1, 5.2)), "b": Stream(0.0, (4,), (0.1,))}
    assert agreed({"server": ours, "other": ours}) == 1.0
    assert agreed({"server": ours, "other": theirs}) == 0.5


def test_a_floor_reads_the_weights_once_a_step_or_computes() -> None:
    floor = Floor(read_bytes=100, operations=50, bytes_per_s=100.0, operations_per_s=100.0)
    assert (floor.step_s(1), floor.step_s(4)) == (1.0, 2.0)
    requests = [greedy_request("one", (1, 2, 3, 4), 2, Selection())]
    assert floor.of(requests, rows=1) == {"tokens_per_s": 0.5, "first_token_ms": 2000.0, "inter_token_ms": 1000.0}


def test_a_plot_is_svg_with_a_line_for_each_name() -> None:
    svg = ElementTree.fromstring(line_plot({"a": [(1, 10), (2, 100)], "b": [(1, 20), (2, 30)]}, "x", "y"))
    assert len(svg.findall("{http://www.w3.org/2000/svg}polyline")) == 2


def test_quick_sizes_use_every_adapter() -> None:
    assert QUICK_SERVING.requests >= QUICK_SERVING.adapters
