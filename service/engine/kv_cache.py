"""Key-value state of the running rows: the general backend.

Rows are padded on the left to a common length in a transformers DynamicCache without sliding windows, so that every
row's last token stands in the last column. Rows join by padding both sides to the longer length, and leave by index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache


class RowsCache:
    """The cached rows of one batch. `mask` [rows, length] is 1 where a row holds a token and 0 where it is padded."""

    def __init__(self, cache: DynamicCache, mask: Tensor) -> None:
        self.cache = cache
        self.mask = mask

    @classmethod
    def empty(cls, mask: Tensor) -> RowsCache:
        """A cache for rows about to be prefilled, whose padding is `mask` [rows, length]."""
        return cls(DynamicCache(), mask)

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def extend(self) -> Tensor:
        """Makes room for one more token in every row; returns its positions [rows, 1]."""
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return positions

    def join(self, other: RowsCache) -> None:
        """Appends the rows of `other`, which may be longer or shorter."""
        length = max(self.length, other.length)
        for layer, joining in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys = torch.cat([_pad(layer.keys, length), _pad(joining.keys, length)])
            layer.values = torch.cat([_pad(layer.values, length), _pad(joining.values, length)])
        masks = [torch.nn.functional.pad(m, (length - m.shape[1], 0)) for m in (self.mask, other.mask)]
        self.mask = torch.cat(masks)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops every row but `rows`, and the columns that then hold padding alone."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        padding = self.length - int(mask.sum(1).max())
        self.mask = mask[:, padding:]
        for layer in self.cache.layers:
            layer.keys = layer.keys[index][:, :, padding:]
            layer.values = layer.values[index][:, :, padding:]


def _pad(states: Tensor, length: int) -> Tensor:
    """States [rows, heads, tokens, features], padded with zeros on the left to `length` tokens."""
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[2], 0))
