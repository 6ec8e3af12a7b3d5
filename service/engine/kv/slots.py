"""The slot backend: every row has a place of its own in tensors that grow in buckets.

Tokens stand at their own positions, so rows of different lengths need no padding, joining copies nothing, and a step
over neighbouring rows reads views. Attention gets an explicit mask. Right for full attention with explicit positions,
which the self-test at load finds out.

Growing copies everything there is, and a step waits for it; so room for a whole batch is reserved at load, as far as
memory allows. On a CPU that costs nothing until it is used: pages come from the system, zero, when first written.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from service.engine.kv.backend import Blocks, StepInputs

_BLOCK = 64  # columns


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
        self._slots.bytes_per_token += (self.keys.nbytes + self.values.nbytes) // (shape[0] * shape[1])

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

    def clear(self, slot: int, columns: int) -> None:
        if self.is_initialized:
            self.keys[slot, :, :columns].zero_()
            self.values[slot, :, :columns].zero_()


def _empty(states: Tensor, slots: int, columns: int) -> Tensor:
    # Zeros: a masked column's value is multiplied by 0, and what a row has not written must not be NaN.
    shape = slots, states.shape[1], columns, states.shape[3]
    if states.device.type != "cpu" or not math.prod(shape):
        return states.new_zeros(shape)
    # PyTorch would write the zeros, a second for half a gigabyte. Fresh pages of the system are zero already.
    pages = mmap.mmap(-1, math.prod(shape) * states.element_size())
    return torch.frombuffer(pages, dtype=states.dtype).view(shape)


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
    return store[:, :, : window.length][window.rows]  # in this order: gathered rows are copied


class SlotBackend:
    """Implements `KVBackend`. Beyond what is reserved, slots grow in powers of two within half of the budget.

    The other half is for prefixes; rows may take it too, but no more of it than they need, in blocks of 64 columns.
    `bytes_per_token` is of all layers together; 0 before the first forward.
    """

    name = "slot"
    ragged = True

    def __init__(self, layers: int, dtype: torch.dtype, device: torch.device, budget_bytes: int) -> None:
        self._layers = [_SlotLayer(self) for _ in range(layers)]
        self._cache = Cache(layers=list(self._layers))
        self._lowest = torch.finfo(dtype).min
        self._dtype = dtype
        self._device = device
        self.budget_bytes = budget_bytes
        self._lengths: list[int] = []
        self._written: list[int] = []  # columns of each row that may hold something, also what a failed forward left
        self._floor = 1, _BLOCK  # slots and columns that are never given back
        self._pending: tuple[list[int], list[int]] | None = None
        self.slots, self.columns = self._floor
        self.bytes_per_token = 0
        self.moves = 0  # counts the times that the tensors have become others
        self.window: _Window

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers if layer.is_initialized)

    @property
    def used_bytes(self) -> int:
        return sum(self._lengths) * self.bytes_per_token

    def length(self, row: int) -> int:
        return self._lengths[row]

    def spare(self, lengths: Sequence[int]) -> int:
        needed = self._bytes(len(lengths), _in_blocks(max(lengths))) if lengths else 0
        return self.budget_bytes - max(needed, self.nbytes)

    def reserve(self, rows: int, longest: int) -> None:
        """Makes room for so many rows as long as half of the budget allows, `longest` at most, and keeps it.

        After the first forward, which tells what a token takes; without rows.
        """
        assert self.bytes_per_token
        assert not self.rows
        affordable = self.budget_bytes // 2 // (rows * self.bytes_per_token) - 1
        columns = min(_in_blocks(longest), affordable // _BLOCK * _BLOCK)
        if columns >= _BLOCK:
            self._floor = rows, columns
            self._resize(rows, columns)

    def add(self, rows: int) -> None:
        self._make_room(self.rows + rows, 1)
        self._lengths += [0] * rows
        self._written += [0] * rows

    def begin(self, rows: Sequence[int], counts: Sequence[int]) -> StepInputs:
        starts = [self._lengths[row] for row in rows]
        length = max(start + count for start, count in zip(starts, counts, strict=True))
        self._make_room(self.rows, length)
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
        for row, start, count in zip(rows, starts, counts, strict=True):
            self._written[row] = max(self._written[row], start + count)
        self._pending = list(rows), list(counts)
        positions = positions.masked_fill(padding, 0).to(self._device)
        return StepInputs(self._cache, self._mask(positions, padding, uniform, starts[0]), positions)

    def begin_decode(self, rows: int) -> list[int]:
        """Prepares one more token of each of the first rows. Returns their lengths: where the tokens go."""
        starts = self._lengths[:rows]
        self._make_room(self.rows, max(starts) + 1)
        for row, start in enumerate(starts):
            self._written[row] = max(self._written[row], start + 1)
        self._pending = list(range(rows)), [1] * rows
        return starts

    def decode_inputs(self, positions: Tensor, columns: Tensor, row_index: Tensor, length: int) -> StepInputs:
        """What a forward by one token of the first rows is given, made of tensors on the device alone.

        positions, columns and row_index [rows, 1]. Attention reads `length` columns, those beyond a row's position
        masked. A row that is only there to fill the batch writes to the scratch column, `self.columns`.
        """
        self.window = _Window(slice(0, len(positions)), row_index, columns, None, length)
        return StepInputs(self._cache, self._additive(positions), positions)

    def _mask(self, positions: Tensor, padding: Tensor, uniform: bool, start: int) -> Tensor | None:
        """None where the model's own causal mask is right: rows of one length that decode, or begin."""
        if uniform and (positions.shape[1] == 1 or start == 0):
            return None
        return self._additive(positions)

    def _additive(self, positions: Tensor) -> Tensor:
        """0 up to each query's position, and the lowest number beyond it."""
        visible = torch.arange(self.window.length, device=self._device) <= positions.unsqueeze(-1)
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(~visible, self._lowest).unsqueeze(1)  # [rows, 1, queries, length]

    def commit(self) -> None:
        assert self._pending is not None
        for row, count in zip(*self._pending, strict=True):
            self._lengths[row] += count
        self._pending = None

    def keep(self, rows: Sequence[int]) -> None:
        """Only the rows that change place are copied. What the others leave behind is cleared: it may be NaN."""
        self._clear(sorted({*range(self.rows)} - {*rows}))
        moves = [(to, row) for to, row in enumerate(rows) if to != row]
        if moves:
            to, row = (torch.tensor(index, device=self._device) for index in zip(*moves, strict=True))
            length = max(self._written[place] for move in moves for place in move)  # zeros too, over what was there
            for layer in self._layers:
                if layer.is_initialized:
                    layer.keys[to, :, :length] = layer.keys[row, :, :length]
                    layer.values[to, :, :length] = layer.values[row, :, :length]
        self._clear(range(len(rows), self.rows))
        self._lengths = [self._lengths[row] for row in rows]
        self._written = [self._written[row] for row in rows]
        self._shrink()

    def read(self, row: int, start: int, end: int) -> Blocks:
        return [
            (layer.keys[row, :, start:end].clone(), layer.values[row, :, start:end].clone()) for layer in self._layers
        ]

    def write(self, row: int, blocks: Blocks) -> None:
        start = self._lengths[row]
        end = start + blocks[0][0].shape[1]
        self._make_room(self.rows, end)
        for layer, (keys, values) in zip(self._layers, blocks, strict=True):
            layer.keys[row, :, start:end] = keys
            layer.values[row, :, start:end] = values
        self._lengths[row] = end
        self._written[row] = max(self._written[row], end)

    def _make_room(self, rows: int, longest: int) -> None:
        """For so many rows, one of which grows to `longest`."""
        longest = max(longest, *self._lengths, 1)
        if rows <= self.slots and longest <= self.columns:
            return
        slots, columns = max(self.slots, _bucket(rows, 1)), max(self.columns, _bucket(longest, _BLOCK))
        if self._bytes(slots, columns) > self.budget_bytes // 2:
            slots, columns = rows, _in_blocks(longest)
        self._resize(slots, columns)

    def _shrink(self) -> None:
        """Gives memory back when no row is left, or when the rows that are left need far less than is taken."""
        slots = max(self._floor[0], _bucket(self.rows, 1))
        columns = max(self._floor[1], _bucket(max(self._lengths, default=1), _BLOCK))
        if not self.rows or self.nbytes > self.budget_bytes // 2 >= 2 * self._bytes(slots, columns):
            self._resize(slots, columns)

    def _clear(self, slots: Sequence[int]) -> None:
        for slot in slots:
            for layer in self._layers:
                layer.clear(slot, self._written[slot])

    def _bytes(self, slots: int, columns: int) -> int:
        return slots * (columns + 1) * self.bytes_per_token

    def _resize(self, slots: int, columns: int) -> None:
        if (slots, columns) == (self.slots, self.columns):
            return
        for layer in self._layers:
            layer.resize(slots, columns)
        self.slots, self.columns = slots, columns
        self.moves += 1


def _as_slice(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def _in_blocks(columns: int) -> int:
    return -(-columns // _BLOCK) * _BLOCK


def _bucket(needed: int, smallest: int) -> int:
    size = smallest
    while size < needed:
        size *= 2
    return size
