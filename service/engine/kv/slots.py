"""The slot backend: every row has a place of its own in tensors that grow in buckets.

Tokens stand at their own positions, so rows of different lengths need no padding, joining copies nothing, and a step
over neighbouring rows reads views. Attention gets an explicit mask. Right for full attention with explicit positions,
which the self-test at load finds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from service.engine.kv.backend import Blocks, StepInputs

_TOKEN_BUCKET = 64


@dataclass(slots=True, eq=False)
class _Window:
    """The part of the slots that one forward touches. `row_index` and `columns` say where its new states go."""

    rows: slice | Tensor  # a run of rows is read as a view, anything else is gathered
    row_index: Tensor  # [rows, 1]
    columns: Tensor  # [rows, queries]: padding goes to the scratch column
    run: slice | None  # set when all rows put their states into the same columns
    length: int  # columns that attention reads


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values [slots, heads, columns + 1, features]; the last column takes what padding writes."""

    is_sliding = False
    is_croppable = False

    def __init__(self, slots: SlotBackend) -> None:
        super().__init__()
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = self._slots.slots, self._slots.columns + 1
        self.keys = _empty(key_states, *shape)
        self.values = _empty(value_states, *shape)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self._slots.window
        return _put(self.keys, key_states, window), _put(self.values, value_states, window)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.window.length, 0

    def get_seq_length(self) -> int:
        window = self._slots.window
        return window.length - window.columns.shape[1]

    def get_max_length(self) -> int:
        return -1

    def resize(self, slots: int, columns: int) -> None:
        """Moves what fits into new tensors; one layer at a time, so that only one is in memory twice."""
        if self.is_initialized:
            self.keys = _moved(self.keys, slots, columns)
            self.values = _moved(self.values, slots, columns)


def _empty(states: Tensor, slots: int, columns: int) -> Tensor:
    # Zeros: a masked column's value is multiplied by 0, and what is not written yet must not be NaN.
    return states.new_zeros(slots, states.shape[1], columns, states.shape[3])


def _moved(old: Tensor, slots: int, columns: int) -> Tensor:
    new = _empty(old, slots, columns + 1)
    kept_slots, kept_columns = min(slots, old.shape[0]), min(columns, old.shape[2] - 1)
    new[:kept_slots, :, :kept_columns] = old[:kept_slots, :, :kept_columns]
    return new


def _put(store: Tensor, states: Tensor, window: _Window) -> Tensor:
    """Writes new states [rows, heads, queries, features] and returns what attention reads."""
    if window.run is not None and isinstance(window.rows, slice):
        store[window.rows, :, window.run] = states
    else:
        store[window.row_index, :, window.columns] = states.transpose(1, 2)
    return store[window.rows][:, :, : window.length]


class SlotBackend:
    """Implements `KVBackend`. `budget_bytes` bounds what `fits`, and how generously the slots grow."""

    name = "slot"

    def __init__(self, layers: int, dtype: torch.dtype, device: torch.device, budget_bytes: int) -> None:
        self._layers = [_SlotLayer(self) for _ in range(layers)]
        self._cache = Cache(layers=list(self._layers))
        self._lowest = torch.finfo(dtype).min
        self._dtype = dtype
        self._device = device
        self._budget = budget_bytes
        self._lengths: list[int] = []
        self._pending: tuple[list[int], list[int]] | None = None
        self.slots, self.columns = 1, _TOKEN_BUCKET
        self.window: _Window

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers if layer.is_initialized)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers together; 0 before the first forward."""
        return self.nbytes // (self.slots * (self.columns + 1))

    def length(self, row: int) -> int:
        return self._lengths[row]

    def fits(self, lengths: Sequence[int], beside: int = 0) -> bool:
        return not lengths or len(lengths) * (max(lengths) + 1) * self.bytes_per_token + beside <= self._budget

    def add(self, rows: int) -> None:
        self._lengths += [0] * rows
        self._grow(self.rows, self.columns)

    def begin(self, rows: Sequence[int], counts: Sequence[int]) -> StepInputs:
        starts = [self._lengths[row] for row in rows]
        length = max(start + count for start, count in zip(starts, counts, strict=True))
        self._grow(self.slots, length)
        queries = max(counts)
        offsets = torch.arange(queries) - (queries - torch.tensor(counts)).unsqueeze(1)  # [rows, queries]
        positions = torch.tensor(starts).unsqueeze(1) + offsets
        padding = offsets < 0
        columns = positions.masked_fill(padding, self.columns)
        uniform = len({*starts}) == 1 and len({*counts}) == 1
        self.window = _Window(
            rows=_as_slice(rows, self._device),
            row_index=torch.tensor(rows, device=self._device).unsqueeze(1),
            columns=columns.to(self._device),
            run=slice(starts[0], length) if uniform else None,
            length=length,
        )
        self._pending = list(rows), list(counts)
        positions = positions.masked_fill(padding, 0).to(self._device)
        return StepInputs(self._cache, self._mask(positions, padding, uniform, starts[0]), positions)

    def _mask(self, positions: Tensor, padding: Tensor, uniform: bool, start: int) -> Tensor | None:
        """None where the model's own causal mask is right: rows of one length that decode, or begin."""
        if uniform and (positions.shape[1] == 1 or start == 0):
            return None
        visible = torch.arange(self.window.length, device=self._device) <= positions.unsqueeze(-1)
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(~visible, self._lowest).unsqueeze(1)  # [rows, 1, queries, length]

    def commit(self) -> None:
        assert self._pending is not None
        for row, count in zip(*self._pending, strict=True):
            self._lengths[row] += count
        self._pending = None

    def keep(self, rows: Sequence[int]) -> None:
        """Only the rows that change place are copied."""
        moves = [(to, row) for to, row in enumerate(rows) if to != row]
        if moves:
            to, row = (torch.tensor(index, device=self._device) for index in zip(*moves, strict=True))
            length = max(self._lengths[each] for _, each in moves)
            for layer in self._layers:
                if layer.is_initialized:
                    layer.keys[to, :, :length] = layer.keys[row, :, :length]
                    layer.values[to, :, :length] = layer.values[row, :, :length]
        self._lengths = [self._lengths[row] for row in rows]
        if not rows:
            self._resize(1, _TOKEN_BUCKET)

    def read(self, row: int, start: int, end: int) -> Blocks:
        return [
            (layer.keys[row, :, start:end].clone(), layer.values[row, :, start:end].clone()) for layer in self._layers
        ]

    def write(self, row: int, blocks: Blocks) -> None:
        start = self._lengths[row]
        end = start + blocks[0][0].shape[1]
        self._grow(self.slots, end)
        for layer, (keys, values) in zip(self._layers, blocks, strict=True):
            layer.keys[row, :, start:end] = keys
            layer.values[row, :, start:end] = values
        self._lengths[row] = end

    def _grow(self, slots: int, columns: int) -> None:
        """Makes room in buckets, powers of two, but never more than the budget allows for what is needed."""
        if slots <= self.slots and columns <= self.columns:
            return
        wanted_slots = _bucket(max(slots, self.rows), 1)
        wanted_columns = _bucket(max(columns, *self._lengths, 1), _TOKEN_BUCKET)
        if wanted_slots * (wanted_columns + 1) * self.bytes_per_token > self._budget:
            wanted_slots, wanted_columns = max(slots, self.rows), max(columns, *self._lengths)
        self._resize(wanted_slots, wanted_columns)

    def _resize(self, slots: int, columns: int) -> None:
        for layer in self._layers:
            layer.resize(slots, columns)
        self.slots, self.columns = slots, columns


def _as_slice(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def _bucket(needed: int, smallest: int) -> int:
    size = smallest
    while size < needed:
        size *= 2
    return size
