"""Which pair of kernels decodes faster here: each runs the model's groups on tables full of adapters, and is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

import torch

from adapters.kernels.delta import GroupDelta, Pair, PairKernels
from adapters.kernels.model_tables import TABLES, LayerGroup, TableSpec
from adapters.kernels.tables import RowTable
from adapters.kernels.trial import fill

_ROUNDS = 9
_ADAPTERS = 64  # in a batch, at most


class Stopwatch(Protocol):
    """Times what a captured step takes on the device, from a cold cache. `kernels` stand in for Triton's."""

    kernels: PairKernels | None

    def capture(self, step: Callable[[], None]) -> Callable[[], None]: ...

    def seconds(self, replay: Callable[[], None]) -> float: ...


def faster_pair(
    groups: Sequence[LayerGroup], spec: TableSpec, rows: int, device: torch.device, watch: Stopwatch
) -> Pair:
    """The pair that takes less time for so many rows, each with another of up to 64 adapters.

    Groups of one shape are timed once, and count as often as they occur. Raises TritonMissing.
    """
    took = {pair: seconds_of(pair, groups, spec, rows, device, watch) for pair in Pair}
    return min(took, key=lambda pair: took[pair])


def seconds_of(
    pair: Pair, groups: Sequence[LayerGroup], spec: TableSpec, rows: int, device: torch.device, watch: Stopwatch
) -> float:
    """What a pair adds to a step of so many rows. Raises TritonMissing."""
    different = list({group.shape: group for group in groups}.values())
    tables = TABLES[pair](different, spec, min(rows, _ADAPTERS), device)
    fill(tables, spec, tables.slots)
    of_rows = RowTable(rows, device=device)
    of_rows.set([[(row % tables.slots, 1.0)] for row in range(rows)])
    total = 0.0
    for group, delta in zip(different, tables.deltas(of_rows, watch.kernels), strict=True):
        replay = watch.capture(_step(delta, spec.dtype))
        often = sum(other.shape == group.shape for other in groups)
        total += often * median(watch.seconds(replay) for _ in range(_ROUNDS))
    return total


def _step(delta: GroupDelta, dtype: torch.dtype) -> Callable[[], None]:
    """The group's low-rank part as a decode step runs it."""
    device, rows = delta.rows.slots.device, delta.rows.rows
    x = torch.zeros(rows, delta.shape.in_features, dtype=dtype, device=device)
    outputs = [torch.zeros(rows, features, dtype=dtype, device=device) for features in delta.shape.out_features]

    def step() -> None:
        delta.shrink(x)
        for projection, output in enumerate(outputs):
            delta.add_projection(output, projection)

    return step
