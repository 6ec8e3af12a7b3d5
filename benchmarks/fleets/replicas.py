"""Replicas of a simulated fleet: places that run, a queue before them, and the adapters in memory."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field


class Memory:
    """The adapters whose factors are in memory: so many, the least recently used leaves first."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._used: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def __contains__(self, adapter: int) -> bool:
        return adapter in self._used

    def touch(self, adapter: int) -> bool:
        """Whether it was there; it is now."""
        if adapter in self._used:
            self._used.move_to_end(adapter)
            return True
        self._used[adapter] = None
        if len(self._used) > self._room:
            self._used.popitem(last=False)
        return False


@dataclass(slots=True)
class Taken:
    """A request that a replica has: it `waits` from its arrival until it runs in a place, with its adapter there."""

    number: int
    replica: int
    hit: bool
    waits: float
    ends: float


@dataclass(slots=True)
class Replica:
    """`places` run at once, in the order in which requests came. `load` counts those that run and those that wait."""

    places: int
    memory: Memory
    load: int = 0
    alive: bool = True
    under_way: dict[int, Taken] = field(default_factory=dict)
    _free_at: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free_at = [0.0] * self.places

    def take(self, now: float, takes: float, compose_s: float, adapter: int) -> tuple[bool, float, float]:
        """(whether the adapter was in memory, how long the request waits for a place and its adapter, when it ends).

        A place is held while the adapter is composed.
        """
        hit = self.memory.touch(adapter)
        starts = max(now, self._free_at[0]) + (0.0 if hit else compose_s)
        ends = starts + takes
        heapq.heapreplace(self._free_at, ends)
        return hit, starts - now, ends
