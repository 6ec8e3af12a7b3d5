"""How long things take, by two clocks.

The wall clock is what users wait by, and what targets are judged by. Processor time, with one thread, is what a shared
machine leaves comparable; with several threads it counts their waiting for each other too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds by each clock."""

    wall: float
    cpu: float


def timed(run: Callable[[], T]) -> tuple[T, Spent]:
    """What `run` returns, and what it took, in all of the process's threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, Spent(time.perf_counter() - wall, time.process_time() - cpu)


def median_wall(spent: Sequence[Spent]) -> float:
    return median(one.wall for one in spent)


def median_ratio(spent: Sequence[Spent], reference: Sequence[Spent]) -> dict[str, float]:
    """The median, over pairs taken side by side, of how many times longer the first took, by each clock."""
    pairs = list(zip(spent, reference, strict=True))
    return {
        "wall": median(one.wall / other.wall for one, other in pairs),
        "cpu": median(one.cpu / other.cpu for one, other in pairs),
    }
