"""Whether kernels compute on this device what they should: tried at load, on adapters of random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapters.kernels import reference
from adapters.kernels.delta import GroupDelta
from adapters.kernels.model_tables import FactorTables, ModelTables, SelectionTables, TableSpec
from adapters.kernels.tables import RowTable

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest output


def compute_rightly(tables: ModelTables, spec: TableSpec, rows: RowTable, deltas: Sequence[GroupDelta]) -> bool:
    """Every group's projections against the reference, for an adapter, the base and a weight of its own.

    The first slot must be nobody's; it is cleared, and the rows are the base's, when this is done.
    """
    fill(tables, spec, 1)
    rows.set([[(0, 1.0)], [], [(0, -0.5)]][: rows.rows])
    try:
        return all(_right(table, spec, rows, delta) for table, delta in zip(tables.tables, deltas, strict=True))
    finally:
        rows.set([])
        tables.clear(0)


def _right(table: reference.Table, spec: TableSpec, rows: RowTable, delta: GroupDelta) -> bool:
    count, device = min(3, rows.rows), rows.slots.device
    x = torch.randn(count, delta.shape.in_features, device=device).to(spec.dtype)
    base = torch.randn(count, delta.shape.total_out, device=device).to(spec.dtype)
    outputs = [base[:, columns].clone() for columns in delta.shape.columns()]
    delta.shrink(x)
    for projection, output in enumerate(outputs):
        delta.add_projection(output, projection)
    exact = base.double() + reference.delta(x, table, rows)
    error = (torch.cat(outputs, 1).double() - exact).abs().max()
    return bool(error <= _TOLERANCES[spec.dtype] * exact.abs().max())


def fill(tables: ModelTables, spec: TableSpec, slots: int) -> None:
    """Puts random adapters of the largest rank into the first slots, each with a bank of its own."""
    if isinstance(tables, FactorTables):
        for factors in tables.tables:
            factors.a[:slots].normal_(std=factors.shape.in_features**-0.5)
            factors.b_t[:slots].normal_()
    if isinstance(tables, SelectionTables):
        for selections in tables.tables:
            most = min(spec.num_vectors, torch.iinfo(selections.indices.dtype).max)
            selections.banks.vectors[:slots].uniform_(-1.0, 1.0)
            selections.indices[:slots].random_(0, most)
            selections.weights[:slots].fill_(1 / spec.topk)
            selections.places[:slots].copy_(torch.arange(slots))
    for table in tables.tables:
        table.ranks[:slots].fill_(spec.rank)
