"""Where the kernels find adapters and rows: tables on the device that never move and never change their shape.

An adapter lives in a *slot*. `RowTable` says which slots each row of a batch runs with; to change a batch's composition
is to copy that one small tensor, so a captured CUDA graph replays for any mix. Two kinds of table hold adapters:

- `BankTable` with `SelectionTable`: banks, and which of their vectors make each tile. Nothing is expanded.
- `FactorTable`: the dense factors.

A *group* is the projections that read the same input (q, k and v; gate and up): they run in one launch, and their
outputs lie side by side in one tensor [rows, total_out].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from adapters.checkpoint import TopKCheckpoint
from adapters.targets import LayerShape
from adapters.vector_bank import VectorBank

NO_SLOT = -1  # of a row without an adapter, or with fewer than others

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class DoesNotFit(ValueError):
    """An adapter, or a batch, that is larger than its table or of another shape."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """The features of projections that read the same input."""

    in_features: int
    out_features: tuple[int, ...]

    @property
    def projections(self) -> int:
        return len(self.out_features)

    @property
    def total_out(self) -> int:
        return sum(self.out_features)

    def columns(self) -> Iterator[slice]:
        """Where each projection's outputs lie in [rows, total_out]."""
        for stop, features in zip(accumulate(self.out_features), self.out_features, strict=True):
            yield slice(stop - features, stop)


class RowTable:
    """Which slots each row runs with, and by which weights.

    `slots` [rows, members] int32, NO_SLOT where there is none; `weights` [rows, members] float32. Both are views of one
    tensor, which is copied to the device at once.
    """

    def __init__(self, rows: int, members: int = 1, *, device: torch.device | str = "cpu") -> None:
        self.rows, self.members = rows, members
        self._packed = torch.zeros(2, rows, members, dtype=torch.int32, device=device)
        self.slots, self.weights = self._packed[0], self._packed[1].view(torch.float32)
        self.slots.fill_(NO_SLOT)

    def set(self, selections: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Each row's (slot, weight) pairs: none for the base, one for an adapter, several for a blend.

        Rows beyond these are the base's. Raises DoesNotFit for more rows, or more members of a row, than there is
        room for.
        """
        if len(selections) > self.rows or any(len(members) > self.members for members in selections):
            raise DoesNotFit(f"the table has room for {self.rows} rows of {self.members} adapters each")
        slots = torch.full((self.rows, self.members), NO_SLOT, dtype=torch.int32)
        weights = torch.zeros(self.rows, self.members)
        for row, members in enumerate(selections):
            for member, (slot, weight) in enumerate(members):
                slots[row, member], weights[row, member] = slot, weight
        self._packed.copy_(torch.stack((slots, weights.view(torch.int32))))


class BankTable:
    """The banks that all groups read: `vectors` [banks, num_vectors, vector_length].

    Adapters on one bank share its place. A bank of longer vectors is cut into pieces of this table's length; its
    indices are translated by `SelectionTable.put`.
    """

    def __init__(
        self,
        banks: int,
        num_vectors: int,
        vector_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_float(dtype)
        self.vectors = torch.zeros(banks, num_vectors, vector_length, dtype=dtype, device=device)

    @property
    def num_vectors(self) -> int:
        return self.vectors.shape[1]

    @property
    def vector_length(self) -> int:
        return self.vectors.shape[2]

    def pieces(self, bank: VectorBank) -> int:
        """How many of this table's vectors each of the bank's makes. Raises DoesNotFit where it has no room."""
        pieces, rest = divmod(bank.vector_length, self.vector_length)
        if rest or pieces * bank.num_vectors > self.num_vectors:
            raise DoesNotFit(
                f"a bank of {bank.num_vectors} vectors of {bank.vector_length} does not fit a table of "
                f"{self.num_vectors} vectors of {self.vector_length}"
            )
        return pieces

    def put(self, place: int, bank: VectorBank) -> None:
        """Raises DoesNotFit."""
        rows = self.pieces(bank) * bank.num_vectors
        self.vectors[place, :rows].copy_(bank.vectors.reshape(rows, self.vector_length))


class SelectionTable:
    """Which bank vectors make each tile of a group's factors, one adapter a slot.

    `indices` [slots, positions, topk] in the narrowest type for the bank; `weights` [slots, positions, topk] float32;
    `ranks` [slots, projections] int32, 0 where the adapter does not adapt the projection; `places` [slots] int32, which
    bank each slot reads. Positions: A's [projections, in_tiles, rank], then B's [out tiles of all projections, rank].
    Adapters of a lower rank or topk leave the rest of theirs at weight 0, which the kernels do not even read.
    """

    def __init__(self, shape: GroupShape, banks: BankTable, *, slots: int, rank: int, topk: int) -> None:
        length = banks.vector_length
        for features in (shape.in_features, *shape.out_features):
            if features % length:
                raise DoesNotFit(f"vectors of {length} do not tile {features} features")
        self.shape, self.banks, self.rank = shape, banks, rank
        self.in_tiles = shape.in_features // length
        self.out_tiles = shape.total_out // length
        self.first_b = shape.projections * self.in_tiles * rank
        positions, device = self.first_b + self.out_tiles * rank, banks.vectors.device
        self.indices = torch.zeros(slots, positions, topk, dtype=index_dtype(banks.num_vectors), device=device)
        self.weights = torch.zeros(slots, positions, topk, device=device)
        self.ranks = torch.zeros(slots, shape.projections, dtype=torch.int32, device=device)
        self.places = torch.zeros(slots, dtype=torch.int32, device=device)
        tiles = torch.tensor([features // length for features in shape.out_features])
        self.projection_of_tile = torch.repeat_interleave(tiles).to(device, torch.int32)  # [out_tiles]

    @property
    def topk(self) -> int:
        return self.indices.shape[2]

    def put(self, slot: int, checkpoint: TopKCheckpoint, names: Sequence[str | None], *, place: int) -> None:
        """The adapter's selections for the group's projections, by their module names; its bank lies at `place`.

        A name that is None, or that the adapter does not adapt, leaves that projection to the base. Raises DoesNotFit.
        """
        config, pieces = checkpoint.config, self.banks.pieces(checkpoint.bank)
        if config.r > self.rank or config.topk > self.topk:
            raise DoesNotFit(
                f"rank {config.r} and topk {config.topk} do not fit a table of rank {self.rank} and topk {self.topk}"
            )
        indices, weights = torch.zeros(self.indices.shape[1:], dtype=torch.long), torch.zeros(self.weights.shape[1:])
        ranks = torch.zeros(self.shape.projections, dtype=torch.int32)
        spans = {layer.name: (layer, rows_a, rows_b) for layer, rows_a, rows_b in checkpoint.layout.spans()}
        all_weights = checkpoint.full_weights()
        for projection, name in enumerate(names):
            if name is None or name not in spans:
                continue
            layer, rows_a, rows_b = spans[name]
            self._check_layer(projection, layer)
            ranks[projection] = config.r
            for rows, to, r_first in ((rows_a, self._a(projection), True), (rows_b, self._b(projection), False)):
                for source, target in ((checkpoint.indices.long(), indices), (all_weights, weights)):
                    tiles = _by_tile(source[rows], config.r, r_first=r_first)  # [tiles, r, k]
                    split = tiles.repeat_interleave(pieces, 0)  # [tiles · pieces, r, k]
                    if target is indices:
                        piece = torch.arange(len(split)) % pieces
                        split = split * pieces + piece[:, None, None]
                    target[to].view(-1, self.rank, self.topk)[:, : config.r, : config.topk] = split
        self.ranks[slot].zero_()  # what is half written has no rank, and is not read
        self.indices[slot].copy_(indices)
        self.weights[slot].copy_(weights)
        self.places[slot] = place
        self.ranks[slot].copy_(ranks)

    def clear(self, slot: int) -> None:
        """Rows that run with this slot are the base's from now on."""
        self.ranks[slot].zero_()

    def _a(self, projection: int) -> slice:
        size = self.in_tiles * self.rank
        return slice(projection * size, (projection + 1) * size)

    def _b(self, projection: int) -> slice:
        columns = list(self.shape.columns())[projection]
        per_feature = self.banks.vector_length
        tiles = slice(columns.start // per_feature, columns.stop // per_feature)
        return slice(self.first_b + tiles.start * self.rank, self.first_b + tiles.stop * self.rank)

    def _check_layer(self, projection: int, layer: LayerShape) -> None:
        expected = self.shape.in_features, self.shape.out_features[projection]
        if (layer.in_features, layer.out_features) != expected:
            raise DoesNotFit(f"{layer.name} is {layer.in_features} → {layer.out_features}, its place {expected}")


class FactorTable:
    """A group's dense factors, one adapter a slot.

    `a` [slots, projections, rank, in_features], `b_t` [slots, rank, total_out], `ranks` [slots, projections] int32;
    `ends` [projections] int32, where each projection's outputs end.
    """

    def __init__(
        self,
        shape: GroupShape,
        *,
        slots: int,
        rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_float(dtype)
        self.shape, self.rank = shape, rank
        self.a = torch.zeros(slots, shape.projections, rank, shape.in_features, dtype=dtype, device=device)
        self.b_t = torch.zeros(slots, rank, shape.total_out, dtype=dtype, device=device)
        self.ranks = torch.zeros(slots, shape.projections, dtype=torch.int32, device=device)
        self.ends = torch.tensor([c.stop for c in shape.columns()], dtype=torch.int32, device=device)

    def put(self, slot: int, factors: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """A [r, in_features] and Bᵀ [r, out_features] of each projection, None for the base. Raises DoesNotFit."""
        ranks = torch.zeros(self.shape.projections, dtype=torch.int32)
        for projection, (pair, out_features) in enumerate(zip(factors, self.shape.out_features, strict=True)):
            if pair is None:
                continue
            a, b_t = pair
            r = ranks[projection] = len(a)
            if r > self.rank or a.shape != (r, self.shape.in_features) or b_t.shape != (r, out_features):
                raise DoesNotFit(f"factors {tuple(a.shape)} and {tuple(b_t.shape)} do not fit projection {projection}")
        self.ranks[slot].zero_()
        for projection, (pair, columns) in enumerate(zip(factors, self.shape.columns(), strict=True)):
            if pair is not None:
                a, b_t = pair
                self.a[slot, projection, : len(a)].copy_(a)
                self.b_t[slot, : len(a), columns].copy_(b_t)
        self.ranks[slot].copy_(ranks)

    def clear(self, slot: int) -> None:
        """Rows that run with this slot are the base's from now on."""
        self.ranks[slot].zero_()


def _by_tile(positions: Tensor, r: int, *, r_first: bool) -> Tensor:
    """[positions, k] of one factor as [tiles, r, k]: what a kernel reads together lies together."""
    if r_first:
        return positions.view(r, -1, positions.shape[-1]).transpose(0, 1)
    return positions.view(-1, r, positions.shape[-1])


def index_dtype(num_vectors: int) -> torch.dtype:
    """The narrowest that Triton and PyTorch both compute with."""
    if num_vectors <= 1 << 8:
        return torch.uint8
    return torch.int16 if num_vectors <= 1 << 15 else torch.int32


def _check_float(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise DoesNotFit(f"tables are float32, bfloat16 or float16, not {dtype}")
