"""Who sends a request where. The parts are the router's own (`service.cluster.policy`), only remembered: a simulation
asks for the same adapters' replicas hundreds of thousands of times.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.cluster.policy import rendezvous


class Homes:
    """The replicas in an adapter's own order, whichever of them live."""

    def __init__(self, replicas: int) -> None:
        self._names = [replica_name(number) for number in range(replicas)]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._known: dict[int, tuple[int, ...]] = {}

    def of(self, adapter: int) -> tuple[int, ...]:
        known = self._known.get(adapter)
        if known is None:
            ordered = rendezvous(adapter_key(adapter), self._names)
            known = self._known[adapter] = tuple(self._numbers[name] for name in ordered)
        return known


def replica_name(number: int) -> str:
    return f"replica-{number}"


def adapter_key(number: int) -> str:
    return f"sha256:{number:064x}"


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a policy decides from. `places` run in a replica, `most` are those and its queue."""

    homes: Homes
    places: int
    most: int
    pick: random.Random


Policy = Callable[[Fleet, int, Sequence[int], Sequence[int]], int | None]
"""(fleet, adapter, each replica's load, those that live) → the replica; None: refused."""


def at_random(fleet: Fleet, adapter: int, loads: Sequence[int], living: Sequence[int]) -> int | None:
    """Any that has room."""
    free = [replica for replica in living if loads[replica] < fleet.most]
    return fleet.pick.choice(free) if free else None


def least_of_two(fleet: Fleet, adapter: int, loads: Sequence[int], living: Sequence[int]) -> int | None:
    """The less loaded of two at random: what the router does with a request that has no adapters."""
    free = [replica for replica in living if loads[replica] < fleet.most]
    two = fleet.pick.sample(free, min(2, len(free)))
    return min(two, key=loads.__getitem__, default=None)


def home_only(fleet: Fleet, adapter: int, loads: Sequence[int], living: Sequence[int]) -> int | None:
    """The adapter's own replica, and no other."""
    home = _first(fleet, adapter, loads, living, math.inf)
    return home if home is not None and loads[home] < fleet.most else None


def spill_when_full(fleet: Fleet, adapter: int, loads: Sequence[int], living: Sequence[int]) -> int | None:
    """The first in the adapter's order whose queue has room."""
    return _first(fleet, adapter, loads, living, fleet.most)


def spill_when_busy(fleet: Fleet, adapter: int, loads: Sequence[int], living: Sequence[int]) -> int | None:
    """The first that would run it at once; where all have a queue, the first whose queue has room."""
    found = _first(fleet, adapter, loads, living, fleet.places)
    return spill_when_full(fleet, adapter, loads, living) if found is None else found


def bounded(fleet: Fleet, adapter: int, loads: Sequence[int], living: Sequence[int]) -> int | None:
    """The first whose load would not exceed the mean by more than a quarter (consistent hashing with bounded loads)."""
    mean = (sum(loads[replica] for replica in living) + 1) / max(1, len(living))
    return _first(fleet, adapter, loads, living, min(fleet.most, math.ceil(_OVER_MEAN * mean)))


_OVER_MEAN = 1.25


def _first(fleet: Fleet, adapter: int, loads: Sequence[int], living: Sequence[int], below: float) -> int | None:
    alive = living if len(living) < len(loads) else None
    for replica in fleet.homes.of(adapter):
        if loads[replica] < below and (alive is None or replica in alive):
            return replica
    return None


POLICIES: dict[str, Policy] = {
    "random": at_random,
    "two": least_of_two,
    "home_only": home_only,
    "spill_when_full": spill_when_full,
    "spill_when_busy": spill_when_busy,
    "bounded": bounded,
}
