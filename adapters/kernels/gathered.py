"""The gathered pair: shrink and expand with dense factors, each row reading those of its own slots.

The batched gather of Punica's BGMV, for several projections in one launch. Sums are cut and ordered as in
`bank_direct`, for the same reasons.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels.blocks import FactorBlocks
from adapters.kernels.parts import constants, put, shrink_grid, slot_and_rank, sum_of_splits
from adapters.kernels.tables import FactorTable, RowTable


@triton.jit
def _shrink(
    x,
    a,  # [slots, PROJECTIONS, RANK, in_features]
    ranks,
    row_slots,
    row_weights,
    h,  # [SPLITS, rows, members, PROJECTIONS, RANK] float32
    x_stride,
    in_features,
    slot_ranks,
    PROJECTIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program: one member of one row, one projection, BLOCK_R of its ranks, one part of the input."""
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    entry = tl.program_id(0)  # row · MEMBERS + member
    projection = tl.program_id(1) // RANK_BLOCKS
    first_rank = (tl.program_id(1) % RANK_BLOCKS) * BLOCK_R
    split = tl.program_id(2)

    slot, rank = slot_and_rank(row_slots, ranks, slot_ranks, entry, projection)
    if first_rank < rank:  # what is beyond it, expand does not read
        r = first_rank + tl.arange(0, BLOCK_R)
        own_x = x + (entry // MEMBERS).to(tl.int64) * x_stride
        own_a = a + ((slot * PROJECTIONS + projection) * RANK + r[:, None]) * in_features
        products = tl.zeros([BLOCK_R, BLOCK_F], dtype=tl.float32)
        for start in range(split * BLOCK_F, in_features, SPLITS * BLOCK_F):
            feature = start + tl.arange(0, BLOCK_F)
            in_x = feature < in_features
            some_x = tl.load(own_x + feature, mask=in_x, other=0.0).to(tl.float32)
            some_a = tl.load(own_a + feature[None, :], mask=(r < rank)[:, None] & in_x[None, :], other=0.0)
            products += some_a.to(tl.float32) * some_x[None, :]
        sums = tl.sum(products, axis=1) * tl.load(row_weights + entry)
        row_of_h = (split * tl.num_programs(0) + entry) * PROJECTIONS + projection
        tl.store(h + row_of_h * RANK + r, sums, mask=r < rank)


@triton.jit(do_not_specialize=["first_projection"])
def _expand(
    h,  # [SPLITS, rows, members, PROJECTIONS, RANK] float32
    b_t,  # [slots, RANK, total_out]
    ranks,
    ends,  # [PROJECTIONS]: where each projection's outputs end
    row_slots,
    out,
    out_stride,
    total_out,
    first_projection,
    slot_ranks,
    PROJECTIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program: BLOCK_F output features of one row and one projection. `out` begins with `first_projection`."""
    row = tl.program_id(0)
    projection = first_projection + tl.program_id(1)
    start = tl.load(ends + projection - 1, mask=projection > 0, other=0)
    feature = start + tl.program_id(2) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_out = feature < tl.load(ends + projection)  # nowhere, for the narrower projections' last programs

    total = tl.zeros([BLOCK_R, BLOCK_F], dtype=tl.float32)
    highest = 0  # rank that any member has here
    for member in range(MEMBERS):
        entry = row * MEMBERS + member
        slot, rank = slot_and_rank(row_slots, ranks, slot_ranks, entry, projection)
        highest = tl.maximum(highest, rank)
        for first_rank in range(0, rank, BLOCK_R):
            r = first_rank + tl.arange(0, BLOCK_R)
            entries = tl.num_programs(0) * MEMBERS
            scale = sum_of_splits(h, entry, entries, projection * RANK + r, r < rank, PROJECTIONS * RANK, SPLITS)
            at = (slot * RANK + r[:, None]) * total_out + feature[None, :]
            some_b = tl.load(b_t + at, mask=(r < rank)[:, None] & in_out[None, :], other=0.0)
            total += scale[:, None] * some_b.to(tl.float32)
    delta = tl.sum(total, axis=0)
    skipped = tl.load(ends + first_projection - 1, mask=first_projection > 0, other=0)
    at = row.to(tl.int64) * out_stride + feature - skipped
    put(out, at, delta, in_out, highest > 0, ADD)


def shrink(x: Tensor, table: FactorTable, rows: RowTable, h: Tensor, blocks: FactorBlocks) -> None:
    """h ← each row's `w · A @ x`, by part of the input, member and projection."""
    _shrink[shrink_grid(len(x) * rows.members, table, blocks)](
        x,
        table.a,
        table.ranks,
        rows.slots,
        rows.weights,
        h,
        x.stride(0),
        table.shape.in_features,
        table.ranks.stride(0),
        BLOCK_F=blocks.features,
        **constants(table, rows, blocks),
    )


def expand(
    h: Tensor,
    table: FactorTable,
    rows: RowTable,
    out: Tensor,
    blocks: FactorBlocks,
    *,
    add: bool,
    projection: int | None = None,
) -> None:
    """out ← each row's `B @ h`, or out + that: of all projections side by side, or of one."""
    features = table.shape.out_features if projection is None else table.shape.out_features[projection : projection + 1]
    _expand[(len(out), len(features), triton.cdiv(max(features), blocks.features))](
        h,
        table.b_t,
        table.ranks,
        table.ends,
        rows.slots,
        out,
        out.stride(0),
        table.shape.total_out,
        projection or 0,
        table.ranks.stride(0),
        ADD=add,
        BLOCK_F=blocks.features,
        **constants(table, rows, blocks),
    )
