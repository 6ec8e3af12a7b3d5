"""A fleet of replicas and very many adapters, simulated: what each way to route costs in composes, waiting and balance.

    python -m benchmarks.fleet [--quick] [--plot DIRECTORY]

No model, no network, no clock: figures depend on the seed alone, but for `decision_us`, what one decision of the router
takes on this machine. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.fleets.figures import after_loss, first_uses_per_s, moved_adapters, summary
from benchmarks.fleets.policies import POLICIES, Homes, adapter_key, replica_name
from benchmarks.fleets.simulation import FleetShape, Loss, Ran, Simulation
from benchmarks.fleets.traffic import Traffic, make_traffic
from benchmarks.plot import line_plot
from benchmarks.report import report_line
from service.cluster.policy import ranks, with_room


@dataclass(frozen=True, slots=True)
class FleetSizes:
    """`load` is offered work over what the fleet can do, `overload` the same beyond capacity. Means are of seconds."""

    shape: FleetShape = field(default_factory=FleetShape)
    exponents: tuple[float, ...] = (0.6, 0.9, 1.1)
    exponent: float = 0.9  # of what is not about exponents
    load: float = 0.7
    overload: float = 1.2
    mean_s: float = 2.0
    requests: int = 400_000
    warm: float = 0.5  # the share of them that fills memories and is not counted
    residents: tuple[int, ...] = (125, 250, 500, 1000, 2000)
    lost: int = 10
    decided_among: tuple[int, ...] = (10, 100, 1000)

    @property
    def capacity(self) -> float:
        """Requests a second, if nothing had to be composed."""
        return self.shape.replicas * self.shape.places / self.mean_s


QUICK = FleetSizes(
    shape=FleetShape(replicas=8, adapters=400, resident=25, places=4, queue=16),
    exponents=(0.9,),
    requests=3_000,
    residents=(10, 50),
    lost=1,
    decided_among=(8,),
)
_PLOTTED = ("random", "two", "spill_when_busy", "bounded")
_LOSING = ("random", "spill_when_full", "spill_when_busy", "bounded")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    sizes = QUICK if options.quick else replace(FleetSizes(), requests=options.requests)
    figures = measure(sizes, options.seed)
    if options.plot is not None:
        options.plot.mkdir(parents=True, exist_ok=True)
        (options.plot / "fleet.svg").write_text(plot(figures["by_memory"]), encoding="utf-8")
    print(report_line("fleet", sizes, figures, (), threads=1))


def measure(sizes: FleetSizes, seed: int) -> dict[str, Any]:
    fleet = _Fleet(sizes, seed)
    return {
        "seed": seed,
        "capacity_per_s": sizes.capacity,
        "by_exponent": {f"{exponent:g}": fleet.policies(exponent, sizes.load) for exponent in sizes.exponents},
        "overload": fleet.policies(sizes.exponent, sizes.overload),
        "by_memory": fleet.memories(),
        "loss": fleet.losses(),
        "decision_us": {str(count): decision_us(count) for count in sizes.decided_among},
    }


class _Fleet:
    """Runs of one fleet. All policies meet the same traffic."""

    def __init__(self, sizes: FleetSizes, seed: int) -> None:
        self._sizes = sizes
        self._seed = seed
        self._homes = Homes(sizes.shape.replicas)
        self._warm = int(sizes.requests * sizes.warm)

    def policies(self, exponent: float, load: float) -> dict[str, Any]:
        traffic = self._traffic(exponent, load)
        figures = {name: self._figures(name, traffic, self._sizes.shape) for name in POLICIES}
        return {"first_uses_per_s": first_uses_per_s(traffic, self._warm), **figures}

    def memories(self) -> dict[str, dict[str, float]]:
        """Composes a second, as a replica's memory has room for more adapters, and those of them that nobody saves."""
        traffic = self._traffic(self._sizes.exponent, self._sizes.load)
        shapes = {resident: replace(self._sizes.shape, resident=resident) for resident in self._sizes.residents}
        composes = {
            name: {f"{room}": self._figures(name, traffic, shape)["composes_per_s"] for room, shape in shapes.items()}
            for name in _PLOTTED
        }
        return {**composes, "first_uses": dict.fromkeys(map(str, shapes), first_uses_per_s(traffic, self._warm))}

    def losses(self) -> dict[str, Any]:
        """Some replicas are lost in the middle of what is counted, and none comes in their place."""
        sizes = self._sizes
        traffic = self._traffic(sizes.exponent, sizes.load)
        loss = Loss((sizes.requests + self._warm) // 2, sizes.lost)
        moved = moved_adapters(self._homes, range(sizes.shape.adapters), range(sizes.lost))
        runs = {name: after_loss(self._run(name, traffic, sizes.shape, loss), traffic, loss) for name in _LOSING}
        return {"lost": sizes.lost, "moved_adapters": moved, **runs}

    def _figures(self, name: str, traffic: Traffic, shape: FleetShape) -> dict[str, Any]:
        return summary(self._run(name, traffic, shape), traffic, self._warm, shape)

    def _run(self, name: str, traffic: Traffic, shape: FleetShape, loss: Loss | None = None) -> Ran:
        return Simulation(shape, POLICIES[name], self._homes, self._seed, loss).run(traffic)

    def _traffic(self, exponent: float, load: float) -> Traffic:
        sizes = self._sizes
        per_second = load * sizes.capacity
        return make_traffic(sizes.requests, sizes.shape.adapters, exponent, per_second, sizes.mean_s, self._seed)


def decision_us(replicas: int, decisions: int = 200) -> float:
    """What the router's own functions take to find a replica among so many, whose loads are known."""
    loads: Mapping[str, int | None] = {replica_name(number): 1 for number in range(replicas)}
    pick = random.Random(0)
    start = time.perf_counter()
    for adapter in range(decisions):
        ranks(adapter_key(adapter), with_room(loads, 2), pick)
    return 1e6 * (time.perf_counter() - start) / decisions


def plot(by_memory: Mapping[str, Mapping[str, float]]) -> str:
    lines = {
        name: [(float(resident), composes) for resident, composes in figures.items() if composes > 0]
        for name, figures in by_memory.items()
    }
    return line_plot(lines, "adapters that fit a replica's memory", "composes a second, all replicas")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description="Simulate a fleet of replicas.")
    parser.add_argument("--quick", action="store_true", help="a tiny fleet: shows that it runs, nothing more")
    parser.add_argument("--requests", type=int, default=400_000, help="of each run (400000)")
    parser.add_argument("--seed", type=int, default=0, help="the figures of one seed are always the same (0)")
    parser.add_argument("--plot", type=Path, metavar="DIRECTORY", help="where to draw fleet.svg")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
