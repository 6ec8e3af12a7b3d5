"""What the kernels compute, in plain torch: row by row, from the same tables, in float64 unless told otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.kernels.tables import FactorTable, RowTable, SelectionTable


def delta(
    x: Tensor, table: SelectionTable | FactorTable, rows: RowTable, *, dtype: torch.dtype = torch.float64
) -> Tensor:
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


def factors(
    table: SelectionTable | FactorTable, slot: int, projection: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
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
