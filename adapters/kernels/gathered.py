"""The gathered pair: shrink and expand with dense factors, each row reading those of its own slots.

The batched gather of Punica's BGMV, for several projections in one launch. Sums are cut and ordered as in
`bank_direct`, for the same reasons.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels.blocks import FactorBlocks
from adapters.kernels.tables import FactorTable, RowTable

WARPS = 4


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

    slot = tl.load(row_slots + entry).to(tl.int64)
    used = slot >= 0
    slot = tl.where(used, slot, 0)
    rank = tl.load(ranks + slot * PROJECTIONS + projection, mask=used, other=0)
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


@triton.jit
def _expand(
    h,  # [SPLITS, rows, members, PROJECTIONS, RANK] float32
    b_t,  # [slots, RANK, total_out]
    ranks,
    ends,  # [PROJECTIONS]: where each projection's outputs end
    row_slots,
    out,
    out_stride,
    total_out,
    PROJECTIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program: BLOCK_F output features of one row and one projection."""
    row = tl.program_id(0)
    projection = tl.program_id(1)
    start = tl.load(ends + projection - 1, mask=projection > 0, other=0)
    feature = start + tl.program_id(2) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_out = feature < tl.load(ends + projection)  # nowhere, for the narrower projections' last programs

    total = tl.zeros([BLOCK_R, BLOCK_F], dtype=tl.float32)
    highest = 0  # rank that any member has here
    for member in range(MEMBERS):
        entry = row * MEMBERS + member
        slot = tl.load(row_slots + entry).to(tl.int64)
        rank = tl.load(ranks + slot * PROJECTIONS + projection, mask=slot >= 0, other=0)
        highest = tl.maximum(highest, rank)
        for first_rank in range(0, rank, BLOCK_R):
            r = first_rank + tl.arange(0, BLOCK_R)
            scale = tl.zeros([BLOCK_R], dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                row_of_h = (split * tl.num_programs(0) * MEMBERS + entry) * PROJECTIONS + projection
                scale += tl.load(h + row_of_h * RANK + r, mask=r < rank, other=0.0)
            at = (slot * RANK + r[:, None]) * total_out + feature[None, :]
            some_b = tl.load(b_t + at, mask=(r < rank)[:, None] & in_out[None, :], other=0.0)
            total += scale[:, None] * some_b.to(tl.float32)
    delta = tl.sum(total, axis=0)
    at_out = out + row.to(tl.int64) * out_stride + feature
    if ADD:
        # What nothing is added to is not written either: the base's bits, -0.0 and NaN payloads included.
        in_out = in_out & (highest > 0)
        delta += tl.load(at_out, mask=in_out, other=0.0).to(tl.float32)
    tl.store(at_out, delta.to(out.dtype.element_ty), mask=in_out)


def shrink(x: Tensor, table: FactorTable, rows: RowTable, h: Tensor, blocks: FactorBlocks) -> None:
    """h ← each row's `w · A @ x`, by part of the input, member and projection."""
    projections = table.shape.projections
    grid = (len(x) * rows.members, projections * triton.cdiv(table.rank, blocks.ranks), blocks.splits)
    _shrink[grid](
        x,
        table.a,
        table.ranks,
        rows.slots,
        rows.weights,
        h,
        x.stride(0),
        table.shape.in_features,
        PROJECTIONS=projections,
        MEMBERS=rows.members,
        RANK=table.rank,
        SPLITS=blocks.splits,
        BLOCK_R=blocks.ranks,
        BLOCK_F=blocks.features,
        num_warps=WARPS,
    )


def expand(h: Tensor, table: FactorTable, rows: RowTable, out: Tensor, blocks: FactorBlocks, *, add: bool) -> None:
    """out ← each row's `B @ h`, or out + that."""
    widest = max(table.shape.out_features)
    grid = (len(out), table.shape.projections, triton.cdiv(widest, blocks.features))
    _expand[grid](
        h,
        table.b_t,
        table.ranks,
        table.ends,
        rows.slots,
        out,
        out.stride(0),
        table.shape.total_out,
        PROJECTIONS=table.shape.projections,
        MEMBERS=rows.members,
        RANK=table.rank,
        SPLITS=blocks.splits,
        ADD=add,
        BLOCK_R=blocks.ranks,
        BLOCK_F=blocks.features,
        num_warps=WARPS,
    )
