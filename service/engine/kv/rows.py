"""The rows backend: rows padded on the left in transformers' own dynamic cache, without sliding windows.

Slower than slots (steps concatenate and joins copy), and right for nearly every architecture that can generate in
batches: the model sees what it sees under `generate`. The rows of one forward take as many tokens each, so that no row
gets padding between its tokens: windows and some position biases count columns, not tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from service.engine.kv.backend import Blocks, StepInputs


class RowsBackend:
    """Implements `KVBackend`. `mask` [rows, columns] is 1 where a row holds a token."""

    name = "rows"
    ragged = False

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        self._device = device
        self.budget_bytes = budget_bytes
        self._cache: DynamicCache | None = None  # None until a row has tokens
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=device)
        self._begun: tuple[list[int], DynamicCache, Tensor] | None = None
        self.bytes_per_token = 0  # of one row; known once one has been run

    @property
    def rows(self) -> int:
        return len(self._mask)

    @property
    def nbytes(self) -> int:
        cache = self._cache  # once: another thread may be asking
        return 0 if cache is None else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    @property
    def used_bytes(self) -> int:
        """Padding included: its columns are held for as long as their row is."""
        return self.nbytes

    def spare(self, lengths: Sequence[int]) -> int:
        needed = len(lengths) * max(lengths, default=0) * self.bytes_per_token
        return self.budget_bytes - max(needed, self.nbytes)

    def reserve(self, rows: int, longest: int) -> None:
        """Nothing: its tensors are made anew with every token."""

    def add(self, rows: int) -> None:
        if self._cache is not None:
            padded = _snapshot(self._cache)
            for layer in padded.layers:
                layer.keys = _pad_rows(layer.keys, rows)
                layer.values = _pad_rows(layer.values, rows)
            self._cache = padded
        self._mask = F.pad(self._mask, (0, 0, 0, rows))

    def begin(self, rows: Sequence[int], counts: Sequence[int]) -> StepInputs:
        assert len({*counts}) == 1, "a row would get padding between its tokens"
        cache, held = self._taken(list(rows))
        mask = F.pad(held, (0, counts[0]), value=1)
        positions = (mask.cumsum(1) - 1)[:, -counts[0] :]
        self._begun = list(rows), cache, mask
        return StepInputs(cache, mask, positions)

    def _taken(self, rows: list[int]) -> tuple[DynamicCache, Tensor]:
        """A cache of these rows alone, without the columns that none of them uses, and its mask.

        Dynamic layers replace their tensors as they grow, so the rows themselves stay as they are until the commit.
        """
        mask = self._mask[rows]
        used = mask.any(0).nonzero()
        first = int(used[0]) if len(used) else mask.shape[1]
        if self._cache is None or first == mask.shape[1]:
            return DynamicCache(), mask[:, :0]
        taken = _snapshot(self._cache)
        if first or rows != list(range(self.rows)):
            for layer in taken.layers:
                layer.keys, layer.values = layer.keys[rows][:, :, first:], layer.values[rows][:, :, first:]
        return taken, mask[:, first:]

    def commit(self) -> None:
        assert self._begun is not None
        (rows, cache, mask), self._begun = self._begun, None
        if rows == list(range(self.rows)):
            self._cache, self._mask = cache, mask
        else:
            self._put_back(rows, cache, mask)
        self.bytes_per_token = self.nbytes // self._mask.numel()

    def _put_back(self, rows: list[int], cache: DynamicCache, mask: Tensor) -> None:
        length = max(self._mask.shape[1], mask.shape[1])
        total = self.rows
        self._mask = _replaced(F.pad(self._mask, (length - self._mask.shape[1], 0)), rows, mask)
        if self._cache is None:
            self._cache = _snapshot(cache)
            for layer in self._cache.layers:
                layer.keys, layer.values = (_pad_rows(s[:0], total)[:, :, :0] for s in (layer.keys, layer.values))
        for layer, joining in zip(self._cache.layers, cache.layers, strict=True):
            layer.keys = _replaced(_pad_columns(layer.keys, length), rows, joining.keys)
            layer.values = _replaced(_pad_columns(layer.values, length), rows, joining.values)

    def keep(self, rows: Sequence[int]) -> None:
        if not rows:
            self._cache, self._mask = None, self._mask[:0, :0]
        elif list(rows) != list(range(self.rows)):
            self._cache, self._mask = self._taken(list(rows))
            self._cache = self._cache if self._cache.layers else None

    def read(self, row: int, start: int, end: int) -> Blocks:
        assert self._cache is not None
        columns = self._mask[row].nonzero().flatten()[start:end]
        return [(layer.keys[row][:, columns], layer.values[row][:, columns]) for layer in self._cache.layers]

    def write(self, row: int, blocks: Blocks) -> None:
        cache, held = self._taken([row])
        for index, (keys, values) in enumerate(blocks):
            cache.update(keys.unsqueeze(0), values.unsqueeze(0), index)
        added = blocks[0][0].shape[1]
        self._begun = [row], cache, F.pad(held, (0, added), value=1)
        self.commit()


def _snapshot(cache: DynamicCache) -> DynamicCache:
    snapshot = copy.copy(cache)
    snapshot.layers = [copy.copy(layer) for layer in cache.layers]
    return snapshot


def _replaced(whole: Tensor, rows: list[int], part: Tensor) -> Tensor:
    """`whole` [rows, …] with some rows replaced by `part`, padded on the left of its column axis to the same length."""
    if part.dim() == 2:
        whole[rows] = F.pad(part, (whole.shape[1] - part.shape[1], 0))
    else:
        whole[rows] = _pad_columns(part, whole.shape[2])
    return whole


def _pad_columns(states: Tensor, length: int) -> Tensor:
    """A copy of states [rows, heads, columns, features], padded with zeros on the left to `length` columns."""
    return F.pad(states, (0, 0, length - states.shape[2], 0)) if length > states.shape[2] else states.clone()


def _pad_rows(states: Tensor, rows: int) -> Tensor:
    """States with empty rows appended."""
    return F.pad(states, (0, 0, 0, 0, 0, 0, 0, rows))
