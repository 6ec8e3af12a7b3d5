"""What of the benchmark of replicas needs no Ray: a plain server measured at a tiny size, and its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import scale
from benchmarks.floor import Floor
from benchmarks.load.processes import tree_cpu_s
from benchmarks.sizes import QUICK_SCALE, ScaleSizes
from benchmarks.workload import greedy_request
from service.engine.selection import Selection

BURN = "import time\nwhile time.process_time() < {seconds}: pass\nprint('burnt', flush=True)\ninput()"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {BURN.format(seconds=0.6)!r}], stdin=subprocess.PIPE)
{BURN.format(seconds=0.3)}
child.communicate(b"\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_plain_server_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(["--quick", "--contenders", "plain"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain = report["contenders"]["plain"]
    assert plain["requests_per_s"] > 0
    assert plain["cpu_s_per_request"] > 0
    assert plain["alone"]["first_token_p50_ms"] > 0
    mixed = plain["mixed"]
    assert mixed["composes_per_request"] + mixed["hits_per_request"] == pytest.approx(1.0, abs=0.05)
    assert mixed["composes_per_request"] > 0.05, "all adapters fit the memory"
    assert mixed["routed"] == {}
    assert "ray_over_plain" not in report
    assert report["floor"]["1_process_requests_per_s"] > plain["requests_per_s"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processor_time_is_that_of_a_process_and_its_children() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline(), process.stdout.readline()] == ["burnt\n", "burnt\n"]
        both = tree_cpu_s(process.pid)
        process.communicate("\n")
    assert 0.8 < both < 3.0
    assert tree_cpu_s(process.pid) == 0.0


def test_counters_are_summed_over_replicas_and_told_apart_by_where_requests_went() -> None:
    text = """# TYPE vblora_adapter_composes counter
vblora_adapter_composes_total{replica="0"} 3.0
vblora_adapter_composes_total{replica="1"} 4.0
# TYPE vblora_routed counter
vblora_routed_total{to="home"} 9.0
vblora_routed_total{to="spilled"} 1.0
"""
    assert scale.sums_of(text) == {"vblora_adapter_composes_total": 7.0, "to home": 9.0, "to spilled": 1.0}


def test_two_processes_have_half_of_the_rows_each() -> None:
    floor = Floor(read_bytes=100, operations=50, bytes_per_s=100.0, operations_per_s=100.0)
    requests = [greedy_request("one", (1, 2, 3, 4), 2, Selection())]
    floors = scale.floors(floor, floor, requests, clients=4)
    # 2 s of prompt; steps of 2 s over 4 rows, of 1 s over 2
    assert floors["1_process_requests_per_s"] == pytest.approx(1 / 3)
    assert floors["2_processes_requests_per_s"] == pytest.approx(2 / 3)


def test_ratios_are_of_the_contenders_that_ran() -> None:
    one, two = figures_of(requests_per_s=2.0, composes=0.1), figures_of(requests_per_s=3.0, composes=0.4)
    compared = scale.compared({"ray_1": one, "ray_2": two})
    assert compared.keys() == {"two_over_one"}
    assert compared["two_over_one"]["requests_per_s"] == 1.5
    assert compared["two_over_one"]["mixed_composes_fewer"] == pytest.approx(-0.3)


def figures_of(requests_per_s: float, composes: float) -> dict[str, Any]:
    seen = {"requests_per_s": requests_per_s, "first_token_p50_ms": 5.0, "cpu_s_per_request": 0.5}
    return {**seen, "alone": seen, "mixed": {**seen, "composes_per_request": composes}}


@pytest.mark.parametrize("sizes", [ScaleSizes(), QUICK_SCALE])
def test_adapters_fit_two_memories_and_not_one(sizes: ScaleSizes) -> None:
    assert sizes.few <= sizes.resident < sizes.adapters < 2 * sizes.resident
