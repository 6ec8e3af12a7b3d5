"""Both start, and the benchmark ends in its line of JSON."""

from __future__ import annotations

import json

import pytest

from benchmarks import startup


def test_startup(capsys: pytest.CaptureFixture[str]) -> None:
    startup.main(["--quick", "--threads", "1"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["targets"] == {}, "figures of tiny sizes are judged"
    assert report["server_s"] > report["help_s"] > 0
    assert report["over_plain"] == pytest.approx(report["server_s"] / report["plain_s"], rel=0.01)


def test_every_target_names_a_figure() -> None:
    figures = {"plain_s": 1.0, "server_s": 1.3, "help_s": 0.6, "over_plain": 1.3}
    assert [target.judge(figures)["met"] for target in startup.TARGETS] == [True, False]
