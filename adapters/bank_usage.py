"""Which vectors of the bank an adapter's layers are mixed from, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.checkpoint import TopKCheckpoint


@dataclass(frozen=True, slots=True, eq=False)
class BankUsage:
    """`shares` [layers, 2, columns] float64: of a layer's A and B, the share of their tiles' weight that goes to the
    bank vectors of each column, `vectors_per_column` neighbours; the last column may have fewer. Each row sums to 1.

    `used_vectors` counts those that any tile gives weight to.
    """

    layers: tuple[str, ...]
    shares: Tensor
    vectors_per_column: int
    used_vectors: int


def bank_usage(checkpoint: TopKCheckpoint, most_columns: int) -> BankUsage:
    """The usage of an adapter's bank, in at most so many columns."""
    assert most_columns >= 1
    per_column = -(-checkpoint.config.num_vectors // most_columns)
    columns = -(-checkpoint.config.num_vectors // per_column)
    indices, weights = checkpoint.indices.long(), checkpoint.full_weights().double()  # [positions, topk]
    tiles = torch.tensor([rows.stop - rows.start for _, *sides in checkpoint.layout.spans() for rows in sides])
    side_of = torch.repeat_interleave(tiles)  # of each position: which of the rows below it adds to
    cells = side_of[:, None] * columns + indices // per_column
    sums = torch.bincount(cells.flatten(), weights.flatten(), minlength=len(tiles) * columns).view(-1, columns)
    of_vectors = torch.bincount(indices.flatten(), weights.flatten(), minlength=checkpoint.config.num_vectors)
    return BankUsage(
        layers=tuple(layer.name for layer in checkpoint.layout.layers),
        shares=(sums / tiles[:, None]).view(-1, 2, columns),
        vectors_per_column=per_column,
        used_vectors=int((of_vectors > 0).sum()),
    )
