"""What a run says of its policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.fleets.policies import Homes
from benchmarks.fleets.replicas import Taken
from benchmarks.fleets.simulation import FleetShape, Loss, Ran
from benchmarks.fleets.traffic import Traffic
from service.commands.bench_figures import quantile

_WINDOW_S = 10.0


def summary(ran: Ran, traffic: Traffic, warm: int, shape: FleetShape) -> dict[str, Any]:
    """Of the requests from number `warm` on. `imbalance` is of the work given: the busiest replica's over the mean."""
    counted = [taken for taken in ran.ended if taken.number >= warm]
    waits = [taken.waits for taken in counted]
    seconds = traffic.at[-1] - traffic.at[warm]
    work: defaultdict[int, float] = defaultdict(float)
    for taken in counted:
        work[taken.replica] += traffic.takes[taken.number]
    return {
        "hit_rate": _hit_rate(counted),
        "composes_per_s": sum(when >= traffic.at[warm] for when in ran.composes) / seconds,
        "imbalance": max(work.values()) * shape.replicas / sum(work.values()) if work else 0.0,
        "wait_p50_s": quantile(waits, 0.5) or 0.0,
        "wait_p99_s": quantile(waits, 0.99) or 0.0,
        "refused": sum(number >= warm for number in ran.refused) / (len(traffic) - warm),
        "ended_per_s": sum(traffic.at[warm] <= taken.ends <= traffic.at[-1] for taken in ran.ended) / seconds,
    }


def first_uses_per_s(traffic: Traffic, warm: int) -> float:
    """Adapters that are asked for for the first time, from number `warm` on: no policy and no memory saves these."""
    before = set(traffic.adapter[:warm])
    return len(set(traffic.adapter[warm:]) - before) / (traffic.at[-1] - traffic.at[warm])


def after_loss(ran: Ran, traffic: Traffic, loss: Loss) -> dict[str, Any]:
    """Hits in the ten seconds before replicas were lost, in those after, and in those at the end; waits just after."""
    at = traffic.at[loss.before]

    def arrived(since: float) -> list[Taken]:
        return [taken for taken in ran.ended if since <= traffic.at[taken.number] < since + _WINDOW_S]

    after = arrived(at)
    return {
        "repeated": ran.repeated,
        "hit_rate_before": _hit_rate(arrived(at - _WINDOW_S)),
        "hit_rate_after": _hit_rate(after),
        "hit_rate_later": _hit_rate(arrived(traffic.at[-1] - _WINDOW_S)),
        "composes_per_s_before": _per_second(ran.composes, at - _WINDOW_S),
        "composes_per_s_after": _per_second(ran.composes, at),
        "wait_p99_after_s": quantile([taken.waits for taken in after], 0.99) or 0.0,
    }


def moved_adapters(homes: Homes, adapters: Sequence[int], lost: Sequence[int]) -> dict[str, float]:
    """The share of adapters whose first replica changes without the lost ones, and of those that have to move."""
    gone = set(lost)
    moved = due = 0
    for adapter in adapters:
        order = homes.of(adapter)
        moved += next(replica for replica in order if replica not in gone) != order[0]
        due += order[0] in gone
    return {"moved": moved / len(adapters), "due": due / len(adapters)}


def _hit_rate(taken: Sequence[Taken]) -> float:
    return sum(one.hit for one in taken) / len(taken) if taken else 0.0


def _per_second(when: Sequence[float], since: float) -> float:
    return sum(since <= one < since + _WINDOW_S for one in when) / _WINDOW_S
