"""A group's low-rank part by either pair of kernels, chosen by measurement or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from adapters.kernels.blocks import FactorBlocks, TileBlocks
from adapters.kernels.tables import FLOATS, DoesNotFit, FactorTable, GroupShape, RowTable, SelectionTable


class TritonMissing(RuntimeError):
    """Triton is not installed, so there are no kernels to run."""


class Pair(Enum):
    BANK_DIRECT = "bank_direct"  # needs a SelectionTable
    GATHERED = "gathered"  # needs a FactorTable


@dataclass(frozen=True, slots=True)
class Timings:
    """What both pairs add to a step, in microseconds by number of rows: figures of `benchmarks.kernels`."""

    microseconds: Mapping[int, Mapping[Pair, float]]

    def faster(self, rows: int) -> Pair:
        """The faster pair at the smallest measured number of rows that is no less than `rows`, or at the largest."""
        measured = sorted(self.microseconds)
        if not measured:
            raise ValueError("nothing was measured: name the pair instead")
        took = self.microseconds[next((count for count in measured if count >= rows), measured[-1])]
        return min(took, key=lambda pair: took[pair])


class GroupDelta:
    """`Σ_j w_j · B_j (A_j x)` of each row, for projections that read the same x: one shrink, one expand.

        rows.set([[(3, 1.0)], [], [(0, 0.7), (5, 0.3)]])   # slot 3, the base, a blend
        delta.add_to(output, x)

    `choice` is a pair, or timings to choose by, for which both tables are needed. A call allocates nothing and does not
    synchronise; for a given number of rows its launches are always the same, so CUDA graphs can replay them. Calls
    share a buffer: they belong on one stream.

    Raises TritonMissing without Triton, DoesNotFit if tables lack or disagree.
    """

    def __init__(
        self,
        rows: RowTable,
        *,
        selections: SelectionTable | None = None,
        factors: FactorTable | None = None,
        choice: Pair | Timings,
    ) -> None:
        shapes = {table.shape for table in (selections, factors) if table is not None}
        if len(shapes) != 1:
            raise DoesNotFit(f"one group has one shape, not {len(shapes)}")
        self.shape: GroupShape = shapes.pop()
        self.rows = rows
        self._choice = choice
        self._runs: dict[Pair, Callable[[Tensor, Tensor, bool], None]] = {}
        if selections is not None:
            self._runs[Pair.BANK_DIRECT] = _bank_direct(selections, rows)
        if factors is not None:
            self._runs[Pair.GATHERED] = _gathered(factors, rows)
        needed = set(Pair) if isinstance(choice, Timings) else {choice}
        if lacking := needed - self._runs.keys():
            raise DoesNotFit(f"no table for {', '.join(sorted(pair.value for pair in lacking))}")

    def pair(self, rows: int) -> Pair:
        """The one that runs for so many rows."""
        return self._choice.faster(rows) if isinstance(self._choice, Timings) else self._choice

    def add_to(self, output: Tensor, x: Tensor) -> None:
        """output += Δ(x): in float32, rounded once. Rows without an adapter are not touched.

        x [n, in_features] and output [n, total_out], each float32, bfloat16 or float16 with contiguous rows, on the
        tables' device; n rows of the RowTable, from its first. Raises DoesNotFit.
        """
        self._run(output, x, add=True)

    def write(self, output: Tensor, x: Tensor) -> None:
        """output = Δ(x), exactly 0 in rows without an adapter; tensors as for `add_to`. Raises DoesNotFit."""
        self._run(output, x, add=False)

    def _run(self, output: Tensor, x: Tensor, *, add: bool) -> None:
        self._check("x", x, self.shape.in_features)
        self._check("output", output, self.shape.total_out)
        if len(x) != len(output) or len(x) > self.rows.rows:
            raise DoesNotFit(f"{len(x)} rows of x, {len(output)} of output, room for {self.rows.rows}")
        if len(x):
            self._runs[self.pair(len(x))](output, x, add)

    def _check(self, name: str, tensor: Tensor, features: int) -> None:
        if tensor.ndim != 2 or tensor.shape[1] != features:
            raise DoesNotFit(f"{name} is {list(tensor.shape)}, not [rows, {features}]")
        if tensor.dtype not in FLOATS or tensor.stride(1) != 1 or tensor.device != self.rows.slots.device:
            raise DoesNotFit(
                f"{name} is {tensor.dtype} on {tensor.device}, strides {tensor.stride()}; float32, bfloat16 or float16 "
                f"with contiguous rows on {self.rows.slots.device} was expected"
            )


def _bank_direct(table: SelectionTable, rows: RowTable) -> Callable[[Tensor, Tensor, bool], None]:
    kernels = _kernels(Pair.BANK_DIRECT)
    length = table.banks.vector_length
    blocks = TileBlocks.of(rank=table.rank, vector_length=length, in_tiles=table.in_tiles)
    h = _buffer(blocks.splits, table, rows)

    def run(output: Tensor, x: Tensor, add: bool) -> None:
        kernels.shrink(x, table, rows, h, blocks)
        kernels.expand(h, table, rows, output, blocks, add=add)

    return run


def _gathered(table: FactorTable, rows: RowTable) -> Callable[[Tensor, Tensor, bool], None]:
    kernels = _kernels(Pair.GATHERED)
    blocks = FactorBlocks.of(rank=table.rank, in_features=table.shape.in_features)
    h = _buffer(blocks.splits, table, rows)

    def run(output: Tensor, x: Tensor, add: bool) -> None:
        kernels.shrink(x, table, rows, h, blocks)
        kernels.expand(h, table, rows, output, blocks, add=add)

    return run


def _buffer(splits: int, table: SelectionTable | FactorTable, rows: RowTable) -> Tensor:
    """Shrink's sums, [splits, rows, members, projections, rank]; fewer rows use the front of it."""
    if table.ranks.device != rows.slots.device:
        raise DoesNotFit(f"the adapters are on {table.ranks.device}, the rows on {rows.slots.device}")
    size = splits * rows.rows * rows.members * table.shape.projections * table.rank
    return torch.empty(size, device=rows.slots.device)


def _kernels(pair: Pair) -> Any:
    """The module with the pair's shrink and expand, which differ in the table they take."""
    try:
        if pair is Pair.GATHERED:
            from adapters.kernels import gathered  # Triton, which is an extra

            return gathered
        from adapters.kernels import bank_direct

        return bank_direct
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] != "triton":
            raise
        raise TritonMissing("Triton is not installed: pip install 'vblora-serve[kernels]'") from missing
