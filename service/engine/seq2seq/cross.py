"""The keys and values that decoders attend to in their prompts, by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

Layers = tuple[tuple[Tensor, Tensor], ...]  # keys and values of each layer, [held rows, heads, columns, features]


@dataclass(frozen=True, slots=True, eq=False)
class CrossStates:
    """What is held of prompts that were read, padded on the right to the longest. Nothing changes: rows come and go in
    a copy.

    `places` says for each row which held one is its own, None while its prompt was not read; `lengths` the tokens of
    each held one.
    """

    layers: Layers = ()
    places: tuple[int | None, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.places)

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Of one row; 0 while nothing is held."""
        columns = max(self.lengths, default=0)
        return self.nbytes // (len(self.lengths) * columns) if columns else 0

    def is_read(self, row: int) -> bool:
        return self.places[row] is not None

    def with_rows(self, rows: int) -> CrossStates:
        """With so many more rows, whose prompts were not read yet."""
        return replace(self, places=(*self.places, *[None] * rows))

    def with_states(self, rows: Sequence[int], layers: Layers, lengths: Sequence[int]) -> CrossStates:
        """With what was read for these rows: `layers` hold one row for each, padded on the right."""
        places = list(self.places)
        for offset, row in enumerate(rows):
            assert places[row] is None, "a prompt was read twice"
            places[row] = len(self.lengths) + offset
        held = (*self.lengths, *lengths)
        columns = max(held)
        joined = layers
        if self.layers:
            pairs = zip(self.layers, layers, strict=True)
            joined = tuple((_stacked(own[0], new[0], columns), _stacked(own[1], new[1], columns)) for own, new in pairs)
        return CrossStates(joined, tuple(places), held)

    def kept(self, rows: Sequence[int]) -> CrossStates:
        """These rows alone, in this order."""
        taken = [place for row in rows if (place := self.places[row]) is not None]
        numbers = iter(range(len(taken)))
        places = tuple(None if self.places[row] is None else next(numbers) for row in rows)
        lengths = tuple(self.lengths[place] for place in taken)
        if lengths == self.lengths and taken == list(range(len(taken))):
            return replace(self, places=places)
        # Copies: a view would hold all of what it is a part of.
        layers = tuple((keys.clone(), values.clone()) for keys, values in self._taken(taken)) if taken else ()
        return CrossStates(layers, places, lengths)

    def of(self, rows: Sequence[int]) -> tuple[DynamicCache, Tensor]:
        """A cache of these rows' states, and which columns [rows, columns] are a row's own (1)."""
        taken = [place for row in rows if (place := self.places[row]) is not None]
        assert len(taken) == len(rows), "a prompt was not read"
        cache = DynamicCache()
        for keys, values in self._taken(taken):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        device = self.layers[0][0].device
        lengths = torch.tensor([self.lengths[place] for place in taken], device=device)
        columns = torch.arange(max(self.lengths[place] for place in taken), device=device)
        return cache, (columns < lengths[:, None]).long()

    def _taken(self, places: Sequence[int]) -> Layers:
        """What is held at these places, as wide as the longest of them: a view where they lie side by side."""
        columns = max(self.lengths[place] for place in places)
        if list(places) == list(range(places[0], places[0] + len(places))):
            index: slice | list[int] = slice(places[0], places[0] + len(places))
        else:
            index = list(places)
        return tuple((keys[index, :, :columns], values[index, :, :columns]) for keys, values in self.layers)


def _stacked(own: Tensor, new: Tensor, columns: int) -> Tensor:
    return torch.cat([_widened(own, columns), _widened(new, columns)])


def _widened(states: Tensor, columns: int) -> Tensor:
    """States [rows, heads, columns, features] padded with zeros on the right."""
    return F.pad(states, (0, 0, 0, columns - states.shape[2]))
