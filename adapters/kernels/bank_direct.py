"""The bank-direct pair: shrink and expand read indices, weights and bank; no factor is ever expanded.

For each row, shrink mixes bank vectors into a tile of A while it multiplies that tile with the row's input; expand
mixes them, by weight and by what shrink found, into the output. All sums are in float32 and in an order that depends
on the table's shape alone, so a row's result is the same to the bit in whatever batch it is computed.

Shrink's input is cut into `SPLITS` parts, so that a few rows fill a GPU too. Their sums lie side by side in `h` and
expand adds them: atomics would need `h` zeroed first, and would add in another order each time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels.blocks import TileBlocks
from adapters.kernels.tables import RowTable, SelectionTable

WARPS = 4


@triton.jit
def _shrink(
    x,
    banks,
    indices,
    weights,
    ranks,
    places,
    row_slots,
    row_weights,
    h,  # [SPLITS, rows, members, PROJECTIONS, RANK] float32
    x_stride,
    in_tiles,
    positions,
    num_vectors,
    VECTOR_LENGTH: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
    RANK: tl.constexpr,
    TOPK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: one member of one row, one projection, BLOCK_R of its ranks, one part of the input."""
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    CHUNKS: tl.constexpr = (VECTOR_LENGTH + BLOCK_L - 1) // BLOCK_L
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
        bank = banks + tl.load(places + slot).to(tl.int64) * num_vectors * VECTOR_LENGTH
        products = tl.zeros([BLOCK_R, BLOCK_T, BLOCK_L], dtype=tl.float32)
        for step in range(split, tl.cdiv(in_tiles, BLOCK_T) * CHUNKS, SPLITS):
            tile = (step // CHUNKS) * BLOCK_T + tl.arange(0, BLOCK_T)
            feature = (step % CHUNKS) * BLOCK_L + tl.arange(0, BLOCK_L)
            in_x = (tile < in_tiles)[:, None] & (feature < VECTOR_LENGTH)[None, :]
            x_tile = tl.load(own_x + tile[:, None] * VECTOR_LENGTH + feature[None, :], mask=in_x, other=0.0)
            inside = (r < rank)[:, None] & (tile < in_tiles)[None, :]
            position = (projection * in_tiles + tile[None, :]) * RANK + r[:, None]
            at = (slot * positions + position) * TOPK  # [BLOCK_R, BLOCK_T]
            mixed = tl.zeros([BLOCK_R, BLOCK_T, BLOCK_L], dtype=tl.float32)
            for k in tl.static_range(TOPK):
                index = tl.load(indices + at + k, mask=inside, other=0).to(tl.int32)
                weight = tl.load(weights + at + k, mask=inside, other=0.0)
                # Later projections and layers read the same bank: it should outlive the base's weights in the cache.
                vectors = tl.load(
                    bank + index[:, :, None] * VECTOR_LENGTH + feature[None, None, :],
                    mask=inside[:, :, None] & in_x[None, :, :],
                    other=0.0,
                    eviction_policy="evict_last",
                )
                mixed += weight[:, :, None] * vectors.to(tl.float32)
            products += mixed * x_tile.to(tl.float32)[None, :, :]
        sums = tl.sum(tl.sum(products, axis=2), axis=1) * tl.load(row_weights + entry)
        row_of_h = (split * tl.num_programs(0) + entry) * PROJECTIONS + projection
        tl.store(h + row_of_h * RANK + r, sums, mask=r < rank)


@triton.jit
def _expand(
    h,  # [SPLITS, rows, members, PROJECTIONS, RANK] float32
    banks,
    indices,
    weights,
    ranks,
    places,
    projection_of_tile,
    row_slots,
    out,
    out_stride,
    out_tiles,
    first_position,
    positions,
    num_vectors,
    VECTOR_LENGTH: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
    RANK: tl.constexpr,
    TOPK: tl.constexpr,
    SPLITS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: BLOCK_T × BLOCK_L output features of one row. Its tiles may be of different projections."""
    row = tl.program_id(0)
    tile = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    feature = tl.program_id(2) * BLOCK_L + tl.arange(0, BLOCK_L)
    in_tile = tile < out_tiles
    in_out = in_tile[:, None] & (feature < VECTOR_LENGTH)[None, :]
    projection = tl.load(projection_of_tile + tile, mask=in_tile, other=0)

    total = tl.zeros([BLOCK_R, BLOCK_T, BLOCK_L], dtype=tl.float32)
    highest = tl.zeros([BLOCK_T], dtype=tl.int32)  # rank that any member has here
    for member in range(MEMBERS):
        entry = row * MEMBERS + member
        slot = tl.load(row_slots + entry).to(tl.int64)
        if slot >= 0:
            rank = tl.load(ranks + slot * PROJECTIONS + projection, mask=in_tile, other=0)
            highest = tl.maximum(highest, rank)
            bank = banks + tl.load(places + slot).to(tl.int64) * num_vectors * VECTOR_LENGTH
            for first_rank in range(0, tl.max(rank, axis=0), BLOCK_R):
                r = first_rank + tl.arange(0, BLOCK_R)
                inside = r[:, None] < rank[None, :]  # 0 beyond the last tile
                scale = tl.zeros([BLOCK_R, BLOCK_T], dtype=tl.float32)
                for split in tl.static_range(SPLITS):
                    row_of_h = (split * tl.num_programs(0) * MEMBERS + entry) * PROJECTIONS + projection
                    scale += tl.load(h + row_of_h[None, :] * RANK + r[:, None], mask=inside, other=0.0)
                at = (slot * positions + first_position + tile[None, :] * RANK + r[:, None]) * TOPK
                for k in tl.static_range(TOPK):
                    index = tl.load(indices + at + k, mask=inside, other=0).to(tl.int32)
                    weight = tl.load(weights + at + k, mask=inside, other=0.0) * scale
                    vectors = tl.load(
                        bank + index[:, :, None] * VECTOR_LENGTH + feature[None, None, :],
                        mask=inside[:, :, None] & in_out[None, :, :],
                        other=0.0,
                        eviction_policy="evict_last",
                    )
                    total += weight[:, :, None] * vectors.to(tl.float32)
    delta = tl.sum(total, axis=0)
    at_out = out + row.to(tl.int64) * out_stride + tile[:, None] * VECTOR_LENGTH + feature[None, :]
    if ADD:
        # What nothing is added to is not written either: the base's bits, -0.0 and NaN payloads included.
        in_out = in_out & (highest > 0)[:, None]
        delta += tl.load(at_out, mask=in_out, other=0.0).to(tl.float32)
    tl.store(at_out, delta.to(out.dtype.element_ty), mask=in_out)


def shrink(x: Tensor, table: SelectionTable, rows: RowTable, h: Tensor, blocks: TileBlocks) -> None:
    """h ← each row's `w · A @ x`, by part of the input, member and projection."""
    entries, projections = len(x) * rows.members, table.shape.projections
    grid = (entries, projections * triton.cdiv(table.rank, blocks.ranks), blocks.splits)
    _shrink[grid](
        x,
        table.banks.vectors,
        table.indices,
        table.weights,
        table.ranks,
        table.places,
        rows.slots,
        rows.weights,
        h,
        x.stride(0),
        table.in_tiles,
        table.indices.shape[1],
        table.banks.num_vectors,
        VECTOR_LENGTH=table.banks.vector_length,
        PROJECTIONS=projections,
        MEMBERS=rows.members,
        RANK=table.rank,
        TOPK=table.topk,
        SPLITS=blocks.splits,
        BLOCK_R=blocks.ranks,
        BLOCK_T=blocks.tiles,
        BLOCK_L=blocks.features,
        num_warps=WARPS,
    )


def expand(h: Tensor, table: SelectionTable, rows: RowTable, out: Tensor, blocks: TileBlocks, *, add: bool) -> None:
    """out ← each row's `B @ h`, or out + that."""
    chunks = triton.cdiv(table.banks.vector_length, blocks.features)
    grid = (len(out), triton.cdiv(table.out_tiles, blocks.tiles), chunks)
    _expand[grid](
        h,
        table.banks.vectors,
        table.indices,
        table.weights,
        table.ranks,
        table.places,
        table.projection_of_tile,
        rows.slots,
        out,
        out.stride(0),
        table.out_tiles,
        table.first_b,
        table.indices.shape[1],
        table.banks.num_vectors,
        VECTOR_LENGTH=table.banks.vector_length,
        PROJECTIONS=table.shape.projections,
        MEMBERS=rows.members,
        RANK=table.rank,
        TOPK=table.topk,
        SPLITS=blocks.splits,
        ADD=add,
        BLOCK_R=blocks.ranks,
        BLOCK_T=blocks.tiles,
        BLOCK_L=blocks.features,
        num_warps=WARPS,
    )
