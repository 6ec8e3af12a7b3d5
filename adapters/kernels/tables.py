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
from adapters.layout import AdapterLayout
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


@dataclass(frozen=True, slots=True, eq=False)
class SelectionStorage:
    """The tensors of one SelectionTable, or of several side by side, whose parts are views.

    `indices` [slots, positions, topk] in the narrowest type for the bank; `weights` [slots, positions, topk] float32;
    `ranks` [slots, projections] int32, 0 where the adapter does not adapt the projection; `places` [slots] int32, which
    bank each slot reads.
    """

    indices: Tensor
    weights: Tensor
    ranks: Tensor
    places: Tensor

    @classmethod
    def empty(cls, banks: BankTable, *, slots: int, positions: int, projections: int, topk: int) -> SelectionStorage:
        device = banks.vectors.device
        return cls(
            torch.zeros(slots, positions, topk, dtype=index_dtype(banks.num_vectors), device=device),
            torch.zeros(slots, positions, topk, device=device),
            torch.zeros(slots, projections, dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
        )

    def part(self, positions: slice, projections: slice) -> SelectionStorage:
        return SelectionStorage(
            self.indices[:, positions], self.weights[:, positions], self.ranks[:, projections], self.places
        )

    def put(self, slot: int, checkpoint: TopKCheckpoint, placement: Placement, *, pieces: int, place: int) -> None:
        """An adapter's selections, each where `placement` says; its bank, cut into `pieces`, lies at `place`."""
        indices = torch.zeros(self.indices.shape[1:], dtype=torch.long)
        weights = torch.zeros(self.weights.shape[1:])
        topk = checkpoint.config.topk
        chosen = checkpoint.indices[placement.source].long() * pieces + placement.piece.unsqueeze(1)
        indices[placement.target, :topk] = chosen
        weights[placement.target, :topk] = checkpoint.full_weights()[placement.source]
        self.ranks[slot].zero_()  # what is half written has no rank, and is not read
        self.indices[slot].copy_(indices.to(self.indices.dtype))
        self.weights[slot].copy_(weights)
        self.places[slot] = place
        self.ranks[slot].copy_(placement.ranks)


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Which position of a layout is which of a table: `source` and `target` [n], int64.

    `piece` [n]: which part of a bank's vector, where the table's are shorter. `ranks` [projections] int32.
    """

    source: Tensor
    target: Tensor
    piece: Tensor
    ranks: Tensor

    @classmethod
    def side_by_side(cls, placements: Sequence[Placement], first_positions: Sequence[int]) -> Placement:
        """As one, of tables whose first positions are these."""
        targets = [each.target + first for each, first in zip(placements, first_positions, strict=True)]
        return cls(
            torch.cat([each.source for each in placements]),
            torch.cat(targets),
            torch.cat([each.piece for each in placements]),
            torch.cat([each.ranks for each in placements]),
        )


class SelectionTable:
    """Which bank vectors make each tile of a group's factors, one adapter a slot, in a SelectionStorage.

    Positions: A's [projections, in_tiles, rank], then B's [out tiles of all projections, rank]. Adapters of a lower
    rank or topk leave the rest of theirs at weight 0, which the kernels do not even read.
    """

    def __init__(
        self,
        shape: GroupShape,
        banks: BankTable,
        *,
        slots: int,
        rank: int,
        topk: int,
        storage: SelectionStorage | None = None,
    ) -> None:
        length = banks.vector_length
        for features in (shape.in_features, *shape.out_features):
            if features % length:
                raise DoesNotFit(f"vectors of {length} do not tile {features} features")
        self.shape, self.banks, self.rank = shape, banks, rank
        self.in_tiles = shape.in_features // length
        self.out_tiles = shape.total_out // length
        self.first_b = shape.projections * self.in_tiles * rank
        positions = positions_of(shape, length, rank)
        self.storage = storage or SelectionStorage.empty(
            banks, slots=slots, positions=positions, projections=shape.projections, topk=topk
        )
        assert self.storage.indices.shape == (slots, positions, topk)
        tiles = torch.tensor([features // length for features in shape.out_features])
        self.projection_of_tile = torch.repeat_interleave(tiles).to(banks.vectors.device, torch.int32)  # [out_tiles]

    @property
    def indices(self) -> Tensor:
        return self.storage.indices

    @property
    def weights(self) -> Tensor:
        return self.storage.weights

    @property
    def ranks(self) -> Tensor:
        return self.storage.ranks

    @property
    def places(self) -> Tensor:
        return self.storage.places

    @property
    def topk(self) -> int:
        return self.indices.shape[2]

    @property
    def slot_positions(self) -> int:
        """From one slot's first position to the next one's: more than its own where tables lie side by side."""
        return self.indices.stride(0) // self.topk

    def tiles(self, projection: int | None) -> range:
        """Of one projection's outputs, or of all."""
        if projection is None:
            return range(self.out_tiles)
        columns, length = list(self.shape.columns())[projection], self.banks.vector_length
        return range(columns.start // length, columns.stop // length)

    def put(self, slot: int, checkpoint: TopKCheckpoint, names: Sequence[str | None], *, place: int) -> None:
        """The adapter's selections for the group's projections, by their module names; its bank lies at `place`.

        A name that is None, or that the adapter does not adapt, leaves that projection to the base. Raises DoesNotFit.
        """
        pieces = self.banks.pieces(checkpoint.bank)
        placement = self.placement(checkpoint.layout, names, pieces)
        self.storage.put(slot, checkpoint, placement, pieces=pieces, place=place)

    def placement(self, layout: AdapterLayout, names: Sequence[str | None], pieces: int) -> Placement:
        """Where the selections of adapters of a layout go. Raises DoesNotFit."""
        r, topk = layout.config.r, layout.config.topk
        if r > self.rank or topk > self.topk:
            raise DoesNotFit(f"rank {r} and topk {topk} do not fit a table of rank {self.rank} and topk {self.topk}")
        ranks = torch.zeros(self.shape.projections, dtype=torch.int32)
        spans = {layer.name: (layer, rows_a, rows_b) for layer, rows_a, rows_b in layout.spans()}
        sources, targets = [], []
        for projection, name in enumerate(names):
            if name is None or name not in spans:
                continue
            layer, rows_a, rows_b = spans[name]
            self._check_layer(projection, layer)
            ranks[projection] = r
            for rows, first, r_first in (
                (rows_a, self._first_a(projection), True),
                (rows_b, self._first_b(projection), False),
            ):
                tiles = _by_tile(torch.arange(rows.start, rows.stop), r, r_first=r_first).repeat_interleave(pieces, 0)
                to = first + torch.arange(len(tiles)).unsqueeze(1) * self.rank + torch.arange(r)  # [tiles · pieces, r]
                sources.append(tiles)
                targets.append(to)
        nothing = torch.zeros(0, r, dtype=torch.long)
        piece = [torch.arange(len(tiles)).remainder(pieces).unsqueeze(1).expand(-1, r) for tiles in sources]
        source, target, part = (torch.cat([nothing, *each]).flatten() for each in (sources, targets, piece))
        return Placement(source, target, part, ranks)

    def clear(self, slot: int) -> None:
        """Rows that run with this slot are the base's from now on."""
        self.ranks[slot].zero_()

    def _first_a(self, projection: int) -> int:
        return projection * self.in_tiles * self.rank

    def _first_b(self, projection: int) -> int:
        return self.first_b + self.tiles(projection).start * self.rank

    def _check_layer(self, projection: int, layer: LayerShape) -> None:
        expected = self.shape.in_features, self.shape.out_features[projection]
        if (layer.in_features, layer.out_features) != expected:
            raise DoesNotFit(f"{layer.name} is {layer.in_features} → {layer.out_features}, its place {expected}")


def positions_of(shape: GroupShape, vector_length: int, rank: int) -> int:
    """How many selections a slot of a SelectionTable has."""
    return (shape.projections * shape.in_features + shape.total_out) // vector_length * rank


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
        self.check(factors)
        self.ranks[slot].zero_()
        for projection, (pair, columns) in enumerate(zip(factors, self.shape.columns(), strict=True)):
            if pair is not None:
                a, b_t = pair
                self.a[slot, projection, : len(a)].copy_(a)
                self.b_t[slot, : len(a), columns].copy_(b_t)
        self.ranks[slot].copy_(torch.tensor([0 if pair is None else len(pair[0]) for pair in factors]))

    def check(self, factors: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """Whether `put` takes these. Raises DoesNotFit."""
        for projection, (pair, out_features) in enumerate(zip(factors, self.shape.out_features, strict=True)):
            if pair is None:
                continue
            a, b_t = pair
            r = len(a)
            if r > self.rank or a.shape != (r, self.shape.in_features) or b_t.shape != (r, out_features):
                raise DoesNotFit(f"factors {tuple(a.shape)} and {tuple(b_t.shape)} do not fit projection {projection}")

    def clear(self, slot: int) -> None:
        """Rows that run with this slot are the base's from now on."""
        self.ranks[slot].zero_()


def _by_tile(positions: Tensor, r: int, *, r_first: bool) -> Tensor:
    """The positions of one factor as [tiles, r]: what a kernel reads together lies together."""
    return positions.view(r, -1).T if r_first else positions.view(-1, r)


def index_dtype(num_vectors: int) -> torch.dtype:
    """The narrowest that Triton and PyTorch both compute with."""
    if num_vectors <= 1 << 8:
        return torch.uint8
    return torch.int16 if num_vectors <= 1 << 15 else torch.int32


def _check_float(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise DoesNotFit(f"tables are float32, bfloat16 or float16, not {dtype}")
