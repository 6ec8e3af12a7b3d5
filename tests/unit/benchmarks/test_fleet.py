"""The simulated fleet loses no request, remembers as an LRU memory does, and routes as the router would."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import fleet
from benchmarks.fleets.figures import first_uses_per_s, moved_adapters, summary
from benchmarks.fleets.policies import POLICIES, Fleet, Homes, adapter_key, bounded, replica_name, spill_when_busy
from benchmarks.fleets.replicas import Memory, Replica
from benchmarks.fleets.simulation import FleetShape, Loss, Ran, Simulation
from benchmarks.fleets.traffic import Traffic, make_traffic, zipf_shares
from service.cluster.policy import ranks, with_room

SHAPE = FleetShape(replicas=6, adapters=300, resident=30, places=4, queue=8)
CAPACITY = SHAPE.replicas * SHAPE.places / 2.0


def traffic_of(load: float, requests: int = 2000, exponent: float = 0.9) -> Traffic:
    return make_traffic(requests, SHAPE.adapters, exponent, load * CAPACITY, 2.0, seed=1)


def run(name: str, traffic: Traffic, shape: FleetShape = SHAPE, loss: Loss | None = None) -> Ran:
    return Simulation(shape, POLICIES[name], Homes(shape.replicas), 1, loss).run(traffic)


# --- requests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("load", [0.5, 3.0])
@pytest.mark.parametrize("loss", [None, Loss(before=1000, replicas=2)])
def test_every_request_ends_once_or_is_refused(name: str, load: float, loss: Loss | None) -> None:
    traffic = traffic_of(load)
    ran = run(name, traffic, loss=loss)
    assert sorted([taken.number for taken in ran.ended] + ran.refused) == list(range(len(traffic)))
    begun = len(ran.ended) + ran.repeated  # a lost request that is then refused was begun, too
    assert sum(not taken.hit for taken in ran.ended) <= len(ran.composes) <= begun
    assert (ran.repeated > 0) == (loss is not None)
    if load > 1:
        assert ran.refused


@pytest.mark.parametrize("name", POLICIES)
def test_no_replica_runs_more_than_its_places_nor_holds_more_than_its_queue(name: str) -> None:
    traffic = traffic_of(3.0)
    ran = run(name, traffic)
    for replica in range(SHAPE.replicas):
        taken = [one for one in ran.ended if one.replica == replica]
        runs = [(one.ends - traffic.takes[one.number], one.ends) for one in taken]
        assert _most_at_once(runs) <= SHAPE.places
        assert _most_at_once([(traffic.at[one.number], one.ends) for one in taken]) <= SHAPE.most


def _most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """An end comes before a beginning at the same moment; rounding is no overlap."""
    steps = sorted([(start + 1e-9, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    running = most = 0
    for _, step in steps:
        running += step
        most = max(most, running)
    return most


def test_requests_wait_for_a_place_and_for_their_adapter() -> None:
    replica = Replica(places=1, memory=Memory(1))
    assert replica.take(0.0, 2.0, 0.5, adapter=7) == (False, 0.5, 2.5)
    assert replica.take(1.0, 2.0, 0.5, adapter=7) == (True, 1.5, 4.5)
    assert replica.take(1.0, 2.0, 0.5, adapter=8) == (False, 4.0, 7.0)
    assert replica.take(9.0, 2.0, 0.5, adapter=8) == (True, 0.0, 11.0)


def test_a_lost_replica_gets_nothing_more_and_its_requests_begin_again_elsewhere() -> None:
    traffic = traffic_of(1.0)
    loss = Loss(before=1000, replicas=2)
    ran = run("spill_when_busy", traffic, loss=loss)
    at = traffic.at[loss.before]
    after = {taken.replica for taken in ran.ended if traffic.at[taken.number] >= at}
    assert len(after) == SHAPE.replicas - loss.replicas
    assert all(taken.ends < at for taken in ran.ended if taken.replica not in after)


# --- memories -------------------------------------------------------------------------------------------


def test_the_least_recently_used_adapter_leaves() -> None:
    memory = Memory(2)
    assert [memory.touch(adapter) for adapter in (1, 2, 1, 3, 1, 2)] == [False, False, True, False, True, False]
    assert [adapter in memory for adapter in (1, 2, 3)] == [True, True, False]


@pytest.mark.parametrize("name", POLICIES)
def test_memories_hold_no_more_than_they_have_room_for(name: str) -> None:
    assert max(run(name, traffic_of(1.0)).residents) == SHAPE.resident


def test_one_replica_with_room_for_all_composes_each_adapter_once() -> None:
    shape = FleetShape(replicas=1, adapters=300, resident=300, places=400, queue=2000)
    traffic = traffic_of(1.0)
    for name in POLICIES:
        assert len(run(name, traffic, shape).composes) == len(set(traffic.adapter))


# --- routing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_simulated_router_decides_as_the_router_does(seed: int) -> None:
    draw = random.Random(seed)
    fleet = Fleet(Homes(SHAPE.replicas), SHAPE.places, SHAPE.most, random.Random(0))
    loads = [draw.choice([0, SHAPE.places, SHAPE.most - 1, SHAPE.most]) for _ in range(SHAPE.replicas)]
    living = sorted(draw.sample(range(SHAPE.replicas), draw.randint(1, SHAPE.replicas)))
    named: dict[str, int | None] = {replica_name(number): loads[number] for number in living}
    free = with_room(named, SHAPE.most)
    busy = set(named).difference(with_room(named, SHAPE.places))
    groups = ranks(adapter_key(seed), free, random.Random(0), busy)
    chosen = spill_when_busy(fleet, seed, loads, living)
    assert (None if chosen is None else replica_name(chosen)) == (groups[0][0] if groups else None)


def test_affinity_hits_more_often_than_chance() -> None:
    traffic = traffic_of(0.7)
    hits = {name: _hit_rate(run(name, traffic)) for name in POLICIES}
    for name in ("home_only", "spill_when_full", "spill_when_busy", "bounded"):
        assert hits[name] > hits["random"] + 0.05, hits
    assert hits["home_only"] >= hits["spill_when_full"] >= hits["spill_when_busy"] - 0.02


def _hit_rate(ran: Ran) -> float:
    return sum(taken.hit for taken in ran.ended) / len(ran.ended)


def test_a_bound_is_kept() -> None:
    fleet = Fleet(Homes(SHAPE.replicas), SHAPE.places, SHAPE.most, random.Random(0))
    loads = [0] * SHAPE.replicas
    for _ in range(60):  # all of one adapter
        chosen = bounded(fleet, 7, loads, range(SHAPE.replicas))
        assert chosen is not None
        loads[chosen] += 1
        assert max(loads) <= 1.25 * sum(loads) / SHAPE.replicas + 1


def test_only_adapters_of_lost_replicas_move_and_they_spread() -> None:
    homes = Homes(50)
    moved = moved_adapters(homes, range(5000), [3, 4])
    assert moved["moved"] == moved["due"] == pytest.approx(2 / 50, abs=0.01)
    seconds = Counter(homes.of(adapter)[1] for adapter in range(5000) if homes.of(adapter)[0] == 3)
    assert len(seconds) > 25
    assert max(seconds.values()) < 12


# --- traffic and figures --------------------------------------------------------------------------------


def test_traffic_is_what_was_asked_for_and_the_same_for_a_seed() -> None:
    traffic = make_traffic(20_000, 1000, 1.1, 50.0, 2.0, seed=3)
    assert traffic == make_traffic(20_000, 1000, 1.1, 50.0, 2.0, seed=3)
    assert traffic != make_traffic(20_000, 1000, 1.1, 50.0, 2.0, seed=4)
    assert all(earlier <= later for earlier, later in pairwise(traffic.at))
    assert len(traffic) / traffic.at[-1] == pytest.approx(50.0, rel=0.05)
    assert sum(traffic.takes) / len(traffic) == pytest.approx(2.0, rel=0.05)
    most = Counter(traffic.adapter)
    assert most[0] / len(traffic) == pytest.approx(float(zipf_shares(1000, 1.1)[0]), rel=0.05)


def test_beyond_capacity_requests_are_refused_and_places_are_full() -> None:
    traffic = traffic_of(2.0, requests=6000)
    figures = summary(run("two", traffic), traffic, 3000, SHAPE)
    assert figures["refused"] == pytest.approx(0.5, abs=0.07)
    assert figures["ended_per_s"] == pytest.approx(CAPACITY, rel=0.1)
    assert figures["imbalance"] < 1.2


def test_nobody_saves_first_uses() -> None:
    traffic = Traffic(at=[0.0, 1.0, 2.0, 3.0, 4.0], adapter=[7, 8, 7, 9, 9], takes=[1.0] * 5)
    assert first_uses_per_s(traffic, 2) == pytest.approx(1 / 2)
    shape = replace(SHAPE, resident=SHAPE.adapters, queue=10_000)  # who refuses a request composes nothing
    traffic = traffic_of(0.7)
    least = first_uses_per_s(traffic, 1000)
    for name in POLICIES:
        figures = summary(run(name, traffic, shape), traffic, 1000, shape)
        assert figures["refused"] == 0
        assert figures["composes_per_s"] >= 0.999 * least
    assert summary(run("home_only", traffic, shape), traffic, 1000, shape)["composes_per_s"] < 1.001 * least


def test_the_benchmark(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fleet.main(["--quick", "--plot", str(tmp_path)])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["by_exponent"].keys() == {"0.9"}
    assert report["by_exponent"]["0.9"].keys() == report["overload"].keys() == {"first_uses_per_s", *POLICIES}
    assert report["loss"]["moved_adapters"]["moved"] == report["loss"]["moved_adapters"]["due"]
    assert report["decision_us"]["8"] > 0
    plot = ElementTree.parse(tmp_path / "fleet.svg")
    assert len(plot.findall("{http://www.w3.org/2000/svg}polyline")) == len(report["by_memory"])
