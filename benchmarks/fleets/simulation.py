"""Requests through a fleet, one after the other: events in the order of time, nothing else.

Every replica runs `places` requests at once, each as fast as if it were alone, and lets others wait in the order in
which they came; a request whose adapter is not in memory holds its place while that is composed. Real batches slow down
as they fill, and real requests come in bursts: differences between policies mean more than seconds do.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.fleets.policies import Fleet, Homes, Policy
from benchmarks.fleets.replicas import Memory, Replica, Taken
from benchmarks.fleets.traffic import Traffic


@dataclass(frozen=True, slots=True)
class FleetShape:
    """A fleet. `resident` are the adapters whose factors fit a replica's memory."""

    replicas: int = 100
    adapters: int = 100_000
    resident: int = 500
    places: int = 16
    queue: int = 256
    compose_s: float = 0.05

    @property
    def most(self) -> int:
        return self.places + self.queue


@dataclass(frozen=True, slots=True)
class Loss:
    """So many replicas end at once, just before the request of that number arrives."""

    before: int
    replicas: int


@dataclass(slots=True)
class Ran:
    """What became of the requests: those that ended, by their number; those refused; those that were begun again."""

    ended: list[Taken] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    repeated: int = 0
    composes: list[float] = field(default_factory=list)
    """When each was."""
    residents: list[int] = field(default_factory=list)
    """Adapters in each replica's memory, at the end."""


class Simulation:
    """One policy over one traffic. `run` once."""

    def __init__(self, shape: FleetShape, policy: Policy, homes: Homes, seed: int, loss: Loss | None = None) -> None:
        self._shape = shape
        self._policy = policy
        self._loss = loss
        self._pick = random.Random(seed)
        self._fleet = Fleet(homes, shape.places, shape.most, self._pick)
        self._replicas = [Replica(shape.places, Memory(shape.resident)) for _ in range(shape.replicas)]
        self._loads = [0] * shape.replicas
        self._living: Sequence[int] = range(shape.replicas)
        self._ending: list[tuple[float, int, int]] = []  # (when, replica, request)
        self._ran = Ran()

    def run(self, traffic: Traffic) -> Ran:
        for number, now in enumerate(traffic.at):
            self._end_until(now)
            if self._loss is not None and number == self._loss.before:
                self._lose(self._loss.replicas, traffic, now)
            self._arrive(number, traffic, now)
        self._end_until(float("inf"))
        self._ran.residents = [len(replica.memory) for replica in self._replicas]
        return self._ran

    def _arrive(self, number: int, traffic: Traffic, now: float) -> None:
        adapter = traffic.adapter[number]
        chosen = self._policy(self._fleet, adapter, self._loads, self._living)
        if chosen is None:
            self._ran.refused.append(number)
            return
        replica = self._replicas[chosen]
        hit, _, ends = replica.take(now, traffic.takes[number], self._shape.compose_s, adapter)
        if not hit:
            self._ran.composes.append(now)
        waits = ends - traffic.takes[number] - traffic.at[number]
        replica.under_way[number] = Taken(number, chosen, hit, waits, ends)
        self._loads[chosen] += 1
        heapq.heappush(self._ending, (ends, chosen, number))

    def _end_until(self, now: float) -> None:
        while self._ending and self._ending[0][0] <= now:
            _, chosen, number = heapq.heappop(self._ending)
            taken = self._replicas[chosen].under_way.get(number)
            if taken is None:
                continue  # its replica was lost
            del self._replicas[chosen].under_way[number]
            self._loads[chosen] -= 1
            self._ran.ended.append(taken)

    def _lose(self, count: int, traffic: Traffic, now: float) -> None:
        """What the lost replicas were at is begun again elsewhere, as an ingress does that has sent nothing yet."""
        lost = set(self._pick.sample(list(self._living), count))
        self._living = [replica for replica in self._living if replica not in lost]
        for number in sorted(lost):
            replica = self._replicas[number]
            again, replica.under_way = sorted(replica.under_way), {}
            self._loads[number] = 0
            self._ran.repeated += len(again)
            for request in again:
                self._arrive(request, traffic, now)
