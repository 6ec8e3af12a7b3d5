"""The soak runs at a tiny size, keeps the promises that it checks, and ends in its line of JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from benchmarks import soak
from benchmarks.load.plan import Mix
from service.commands.bench_figures import quantile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        soak.main(["--quick", "--threads", "1"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (end.value.code, report["broken"], report["exit_status"]) == (0, 0, 0)
    assert report["rounds"] == soak.QUICK.least_rounds
    assert report["endings"].keys() <= {"answered", "left", "overloaded"}
    assert report["requests"] == sum(report["endings"].values())
    assert report["adapter_changes"] > 0
    assert report["overload"]["accepted_p99_over_drain"] > 0
    assert report["memory"].keys() == {"start_bytes", "middle_bytes", "end_bytes", "second_half_grew_bytes"}
    assert report["gauges_at_end"]["pins"] == report["gauges_at_end"]["queue_depth"] == 0
    assert report["targets"] == {}, "figures of tiny sizes are judged"


def test_a_seed_plans_the_same_load_each_time() -> None:
    mix = Mix(("a", "b", "c"), leaving=0.5)
    assert mix.asks(50, seed=1) == mix.asks(50, seed=1) != mix.asks(50, seed=2)
    asks = mix.asks(300, seed=1)
    assert {ask.path for ask in asks} == {"/v1/generate", "/v1/completions", "/v1/chat/completions"}
    assert {ask.streams for ask in asks} == {ask.leaving is None for ask in asks} == {True, False}
    assert any("adapters" in ask.body for ask in asks)
    assert any("+" in ask.body.get("model", "") for ask in asks)
    assert any(ask.body.get("n") == 3 and "stop" in ask.body for ask in asks)
    assert any(ask.body.get("echo") and ask.body["max_tokens"] == 0 for ask in asks)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 3.0), (0.99, 4.0), (1.0, 4.0)])
def test_a_quantile_is_one_of_the_values(share: float, expected: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == expected


def test_of_nothing_there_is_no_quantile() -> None:
    assert quantile([], 0.5) is None
