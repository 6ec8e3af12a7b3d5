"""Every contender of the benchmark of replicas runs at a tiny size, over a Ray of its own."""

from __future__ import annotations

import json

import pytest

from benchmarks import scale
from benchmarks.sizes import QUICK_SCALE

pytestmark = pytest.mark.heavy


def test_replicas_are_measured_beside_plain_servers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    scale.main(["--quick"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["contenders"].keys() == scale.KINDS.keys()
    for name in ("ray_1", "ray_2", "ray_2_random"):
        mixed = report["contenders"][name]["mixed"]
        assert sum(mixed["routed"].values()) == QUICK_SCALE.mixed_requests
        assert mixed["composes_per_request"] + mixed["hits_per_request"] == pytest.approx(1.0, abs=0.05)
    assert report["ray_over_plain"].keys() == report["affinity_over_random"].keys()
