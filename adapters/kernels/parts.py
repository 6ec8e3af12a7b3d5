"""What the kernels of both pairs have in common: how they find an adapter, add what shrink left, and write."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from adapters.kernels.blocks import FactorBlocks, TileBlocks
from adapters.kernels.tables import FactorTable, RowTable, SelectionTable

WARPS = 4


@triton.jit
def slot_and_rank(row_slots, ranks, slot_ranks, entry, projection):
    """Where the adapter of a row's member is, and its rank in a projection: 0 where there is none, and then slot 0."""
    slot = tl.load(row_slots + entry).to(tl.int64)
    used = slot >= 0
    slot = tl.where(used, slot, 0)
    return slot, tl.load(ranks + slot * slot_ranks + projection, mask=used, other=0)


@triton.jit
def sum_of_splits(h, entry, entries, at, inside, PER_ENTRY: tl.constexpr, SPLITS: tl.constexpr):
    """`h` [SPLITS, entries, PER_ENTRY] of one entry, added up over the splits; 0 where `at` is not inside."""
    total = tl.load(h + entry * PER_ENTRY + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(h + (split * entries + entry) * PER_ENTRY + at, mask=inside, other=0.0)
    return total


@triton.jit
def put(out, at, delta, inside, touched, ADD: tl.constexpr):
    """Writes a program's outputs; with ADD, adds them where something is `touched`."""
    if ADD:
        # What nothing is added to is not written either: the base's bits, -0.0 and NaN payloads included.
        inside = inside & touched
        delta += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, delta.to(out.dtype.element_ty), mask=inside)


def constants(table: SelectionTable | FactorTable, rows: RowTable, blocks: TileBlocks | FactorBlocks) -> dict[str, Any]:
    """What every launch is compiled for."""
    return {
        "PROJECTIONS": table.shape.projections,
        "MEMBERS": rows.members,
        "RANK": table.rank,
        "SPLITS": blocks.splits,
        "BLOCK_R": blocks.ranks,
        "num_warps": WARPS,
    }


def shrink_grid(
    entries: int, table: SelectionTable | FactorTable, blocks: TileBlocks | FactorBlocks
) -> tuple[int, int, int]:
    """Members of rows, blocks of ranks of every projection, and parts of the input."""
    return entries, table.shape.projections * triton.cdiv(table.rank, blocks.ranks), blocks.splits
