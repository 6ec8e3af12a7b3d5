"""A group's low-rank part by either pair of kernels, chosen by measurement or by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

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


class PairKernels(Protocol):
    """A pair of kernels: a module with these two functions, for the tables that it can read."""

    def shrink(self, x: Tensor, table: Any, rows: RowTable, h: Tensor, blocks: Any) -> None: ...

    def expand(
        self,
        h: Tensor,
        table: Any,
        rows: RowTable,
        out: Tensor,
        blocks: Any,
        *,
        add: bool,
        projection: int | None = None,
    ) -> None: ...


class GroupDelta:
    """`Σ_j w_j · B_j (A_j x)` of each row, for projections that read the same x: one shrink, one expand.

        rows.set([[(3, 1.0)], [], [(0, 0.7), (5, 0.3)]])   # slot 3, the base, a blend
        delta.add_to(output, x)

    Or one shrink and an expand for each projection, where their outputs are tensors of their own:

        delta.shrink(x)
        delta.add_projection(q, 0)
        delta.add_projection(k, 1)

    `choice` is a pair, or timings to choose by, for which both tables are needed. `kernels` stand in for Triton's;
    `scratch` is a float32 buffer of `scratch_size` that groups may share, as long as each one's shrink and expands come
    one after the other. A call allocates nothing and does not synchronise; for a given number of rows its launches are
    always the same, so CUDA graphs can replay them. Calls share a buffer: they belong on one stream.

    Raises TritonMissing without Triton, DoesNotFit if tables lack or disagree.
    """

    def __init__(
        self,
        rows: RowTable,
        *,
        selections: SelectionTable | None = None,
        factors: FactorTable | None = None,
        choice: Pair | Timings,
        kernels: PairKernels | None = None,
        scratch: Tensor | None = None,
    ) -> None:
        tables = {Pair.BANK_DIRECT: selections, Pair.GATHERED: factors}
        shapes = {table.shape for table in tables.values() if table is not None}
        if len(shapes) != 1:
            raise DoesNotFit(f"one group has one shape, not {len(shapes)}")
        self.shape: GroupShape = shapes.pop()
        self.rows = rows
        self._choice = choice
        self._runs = {
            pair: _Run.of(pair, table, rows, kernels or triton_kernels(pair), scratch)
            for pair, table in tables.items()
            if table is not None
        }
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

    def shrink(self, x: Tensor) -> None:
        """The first half, for `add_projection`; x as for `add_to`. Raises DoesNotFit."""
        self._check("x", x, self.shape.in_features)
        self._runs[self.pair(len(x))].shrink(x)

    def add_projection(self, output: Tensor, projection: int) -> None:
        """output [n, out_features] of one projection += its part, of the x that was shrunk last. Raises DoesNotFit."""
        self._check("output", output, self.shape.out_features[projection])
        self._runs[self.pair(len(output))].expand(output, add=True, projection=projection)

    def _run(self, output: Tensor, x: Tensor, *, add: bool) -> None:
        self._check("x", x, self.shape.in_features)
        self._check("output", output, self.shape.total_out)
        if len(x) != len(output):
            raise DoesNotFit(f"{len(x)} rows of x, {len(output)} of output")
        if len(x):
            run = self._runs[self.pair(len(x))]
            run.shrink(x)
            run.expand(output, add=add)

    def _check(self, name: str, tensor: Tensor, features: int) -> None:
        if tensor.ndim != 2 or tensor.shape[1] != features or len(tensor) > self.rows.rows:
            raise DoesNotFit(f"{name} is {list(tensor.shape)}, not [rows, {features}] of {self.rows.rows} rows at most")
        if tensor.dtype not in FLOATS or tensor.stride(1) != 1 or tensor.device != self.rows.slots.device:
            raise DoesNotFit(
                f"{name} is {tensor.dtype} on {tensor.device}, strides {tensor.stride()}; float32, bfloat16 or float16 "
                f"with contiguous rows on {self.rows.slots.device} was expected"
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """One pair over its table. `h` holds shrink's sums, [splits, rows, members, projections, rank]."""

    kernels: PairKernels
    table: SelectionTable | FactorTable
    rows: RowTable
    blocks: TileBlocks | FactorBlocks
    h: Tensor

    @classmethod
    def of(
        cls,
        pair: Pair,
        table: SelectionTable | FactorTable,
        rows: RowTable,
        kernels: PairKernels,
        scratch: Tensor | None,
    ) -> _Run:
        if table.ranks.device != rows.slots.device:
            raise DoesNotFit(f"the adapters are on {table.ranks.device}, the rows on {rows.slots.device}")
        size = scratch_size(table, rows)
        h = torch.empty(size, device=rows.slots.device) if scratch is None else scratch
        assert h.numel() >= size
        return cls(kernels, table, rows, _blocks(table), h)

    def shrink(self, x: Tensor) -> None:
        self.kernels.shrink(x, self.table, self.rows, self.h, self.blocks)

    def expand(self, output: Tensor, *, add: bool, projection: int | None = None) -> None:
        self.kernels.expand(self.h, self.table, self.rows, output, self.blocks, add=add, projection=projection)


def scratch_size(table: SelectionTable | FactorTable, rows: RowTable) -> int:
    """How many float32 numbers lie between shrink and expand, for all rows; fewer rows use the front."""
    return _blocks(table).splits * rows.rows * rows.members * table.shape.projections * table.rank


def _blocks(table: SelectionTable | FactorTable) -> TileBlocks | FactorBlocks:
    if isinstance(table, FactorTable):
        return FactorBlocks.of(rank=table.rank, in_features=table.shape.in_features)
    return TileBlocks.of(rank=table.rank, vector_length=table.banks.vector_length, in_tiles=table.in_tiles)


def triton_kernels(pair: Pair) -> PairKernels:
    """The module with the pair's shrink and expand, which differ in the table they take. Raises TritonMissing."""
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
