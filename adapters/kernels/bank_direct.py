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
from adapters.kernels.parts import constants, put, shrink_grid, slot_and_rank, sum_of_splits
from adapters.kernels.tables import RowTable, SelectionTable


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
    slot_positions,
    slot_ranks,
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

    slot, rank = slot_and_rank(row_slots, ranks, slot_ranks, entry, projection)
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
            at = (slot * slot_positions + position) * TOPK  # [BLOCK_R, BLOCK_T]
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


@triton.jit(do_not_specialize=["first_tile"])
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
    first_tile,
    end_tile,
    first_position,
    slot_positions,
    slot_ranks,
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
    """One program: BLOCK_T × BLOCK_L output features of one row. Its tiles may be of different projections.

    `out` holds the tiles from `first_tile` to `end_tile`.
    """
    row = tl.program_id(0)
    tile = first_tile + tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    feature = tl.program_id(2) * BLOCK_L + tl.arange(0, BLOCK_L)
    in_tile = tile < end_tile
    in_out = in_tile[:, None] & (feature < VECTOR_LENGTH)[None, :]
    projection = tl.load(projection_of_tile + tile, mask=in_tile, other=0)

    total = tl.zeros([BLOCK_R, BLOCK_T, BLOCK_L], dtype=tl.float32)
    highest = tl.zeros([BLOCK_T], dtype=tl.int32)  # rank that any member has here
    for member in range(MEMBERS):
        entry = row * MEMBERS + member
        slot = tl.load(row_slots + entry).to(tl.int64)
        if slot >= 0:
            rank = tl.load(ranks + slot * slot_ranks + projection, mask=in_tile, other=0)
            highest = tl.maximum(highest, rank)
            bank = banks + tl.load(places + slot).to(tl.int64) * num_vectors * VECTOR_LENGTH
            for first_rank in range(0, tl.max(rank, axis=0), BLOCK_R):
                r = first_rank + tl.arange(0, BLOCK_R)
                inside = r[:, None] < rank[None, :]  # 0 beyond the last tile
                of_h = projection[None, :] * RANK + r[:, None]
                entries = tl.num_programs(0) * MEMBERS
                scale = sum_of_splits(h, entry, entries, of_h, inside, PROJECTIONS * RANK, SPLITS)
                at = (slot * slot_positions + first_position + tile[None, :] * RANK + r[:, None]) * TOPK
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
    at = row.to(tl.int64) * out_stride + (tile - first_tile)[:, None] * VECTOR_LENGTH + feature[None, :]
    put(out, at, delta, in_out, (highest > 0)[:, None], ADD)


def shrink(x: Tensor, table: SelectionTable, rows: RowTable, h: Tensor, blocks: TileBlocks) -> None:
    """h ← each row's `w · A @ x`, by part of the input, member and projection."""
    _shrink[shrink_grid(len(x) * rows.members, table, blocks)](
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
        table.slot_positions,
        table.ranks.stride(0),
        table.banks.num_vectors,
        VECTOR_LENGTH=table.banks.vector_length,
        TOPK=table.topk,
        BLOCK_T=blocks.tiles,
        BLOCK_L=blocks.features,
        **constants(table, rows, blocks),
    )


def expand(
    h: Tensor,
    table: SelectionTable,
    rows: RowTable,
    out: Tensor,
    blocks: TileBlocks,
    *,
    add: bool,
    projection: int | None = None,
) -> None:
    """out ← each row's `B @ h`, or out + that: of all projections side by side, or of one."""
    tiles = table.tiles(projection)
    chunks = triton.cdiv(table.banks.vector_length, blocks.features)
    _expand[(len(out), triton.cdiv(len(tiles), blocks.tiles), chunks)](
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
        tiles.start,
        tiles.stop,
        table.first_b,
        table.slot_positions,
        table.ranks.stride(0),
        table.banks.num_vectors,
        VECTOR_LENGTH=table.banks.vector_length,
        TOPK=table.topk,
        ADD=add,
        BLOCK_T=blocks.tiles,
        BLOCK_L=blocks.features,
        **constants(table, rows, blocks),
    )
