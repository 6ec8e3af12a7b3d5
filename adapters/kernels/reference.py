"""What the kernels compute, in plain torch, from the same tables.

`delta` is the yardstick: row by row, in float64 unless told otherwise. `shrink` and `expand` stand in for a pair of
kernels where there is no GPU: in float32, and blind to what the tensors hold, so that a captured step may call them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.kernels.blocks import FactorBlocks, TileBlocks
from adapters.kernels.tables import FactorTable, RowTable, SelectionTable

Table = SelectionTable | FactorTable


def delta(x: Tensor, table: Table, rows: RowTable, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """`Σ_j w_j · (x @ A_jᵀ) @ B_jᵀ` of every row and projection.

    x [rows, in_features]. Returns [rows, total_out] in `dtype`, exactly 0 for rows without an adapter.
    """
    total = torch.zeros(len(x), table.shape.total_out, dtype=dtype, device=x.device)
    slots, weights = rows.slots.tolist(), rows.weights.to(dtype)
    for row, own in enumerate(x.to(dtype)):
        for member, slot in enumerate(slots[row]):
            if slot < 0:
                continue
            for projection, columns in enumerate(table.shape.columns()):
                a, b_t = factors(table, slot, projection, dtype)
                total[row, columns] += weights[row, member] * (a @ own) @ b_t
    return total


def factors(table: Table, slot: int, projection: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A [r, in_features] and Bᵀ [r, out_features] of one projection of the adapter in a slot."""
    rank, columns = int(table.ranks[slot, projection]), list(table.shape.columns())[projection]
    if isinstance(table, FactorTable):
        return table.a[slot, projection, :rank].to(dtype), table.b_t[slot, :rank, columns].to(dtype)
    vectors = table.banks.vectors[int(table.places[slot])].to(dtype)
    tiles = (table.weights[slot].to(dtype).unsqueeze(-1) * vectors[table.indices[slot].long()]).sum(1)
    a, b = tiles[: table.first_b], tiles[table.first_b :]
    a = a.view(table.shape.projections, table.in_tiles, table.rank, -1)[projection, :, :rank]
    b = b.view(table.out_tiles, table.rank, -1)[table.projection_of_tile == projection, :rank]
    return a.transpose(0, 1).flatten(1), b.transpose(0, 1).flatten(1)


# --- in place of a pair of kernels ----------------------------------------------------------------


def shrink(x: Tensor, table: Table, rows: RowTable, h: Tensor, blocks: TileBlocks | FactorBlocks) -> None:
    """h ← each row's `w · A @ x` [rows, members, projections, rank], of a flat buffer that may be larger."""
    a, _ = _of_rows(table, rows, len(x))
    inside = _inside(table, rows, len(x))
    products = torch.einsum("ni,nmpri->nmpr", x.float(), a) * rows.weights[: len(x), :, None, None]
    h[: inside.numel()].view(inside.shape).copy_(products.where(inside, 0.0))


def expand(
    h: Tensor,
    table: Table,
    rows: RowTable,
    out: Tensor,
    blocks: TileBlocks | FactorBlocks,
    *,
    add: bool,
    projection: int | None = None,
) -> None:
    """out ← each row's `B @ h`, or out + that: of all projections side by side, or of one."""
    _, b_t = _of_rows(table, rows, len(out))
    inside = _inside(table, rows, len(out))
    by_rank = h[: inside.numel()].view(inside.shape)  # 0 where not inside
    columns = list(table.shape.columns())
    wanted = range(len(columns)) if projection is None else (projection,)
    start = columns[wanted[0]].start
    for each in wanted:
        part = out[:, columns[each].start - start : columns[each].stop - start]
        total = torch.einsum("nmr,nmro->no", by_rank[:, :, each], b_t[..., columns[each]])
        if add:
            total = (part.float() + total).to(out.dtype).where(inside[:, :, each].any((1, 2)).unsqueeze(1), part)
        part.copy_(total)


def _inside(table: Table, rows: RowTable, count: int) -> Tensor:
    """Which [rows, members, projections, rank] there are."""
    slots = rows.slots[:count]
    ranks = table.ranks[slots.clamp_min(0).long()].where((slots >= 0).unsqueeze(-1), 0)
    return torch.arange(table.rank, device=slots.device) < ranks.unsqueeze(-1)


def _of_rows(table: Table, rows: RowTable, count: int) -> tuple[Tensor, Tensor]:
    """A [rows, members, projections, rank, in_features] and Bᵀ [rows, members, rank, total_out] of the rows' slots."""
    slots = rows.slots[:count].clamp_min(0).long()
    if isinstance(table, FactorTable):
        return table.a[slots].float(), table.b_t[slots].float()
    places = table.places[slots].long()[..., None, None] * table.banks.num_vectors
    vectors = table.banks.vectors.flatten(0, 1)[places + table.indices[slots].long()].float()
    tiles = (table.weights[slots].unsqueeze(-1) * vectors).sum(-2)  # [rows, members, positions, vector_length]
    a, b = tiles[:, :, : table.first_b], tiles[:, :, table.first_b :]
    of_rows = a.shape[:2]
    a = a.reshape(*of_rows, table.shape.projections, table.in_tiles, table.rank, -1).transpose(3, 4).flatten(4)
    return a, b.reshape(*of_rows, table.out_tiles, table.rank, -1).transpose(2, 3).flatten(3)
