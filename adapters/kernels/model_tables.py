"""Tables for all groups of a model: where an adapter's slot holds everything that decode kernels read of it.

`SelectionTables` hold compact selections and banks, for the bank-direct pair: little for each adapter, VB-LoRA alone.
`FactorTables` hold dense factors, for the gathered pair: much for each adapter, plain LoRA of low rank too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from adapters.factors import AdapterFactors
from adapters.kernels.delta import GroupDelta, Pair, PairKernels, scratch_size
from adapters.kernels.tables import (
    BankTable,
    DoesNotFit,
    FactorTable,
    GroupShape,
    Placement,
    RowTable,
    SelectionStorage,
    SelectionTable,
    index_dtype,
    positions_of,
)
from adapters.layout import AdapterLayout
from adapters.targets import LayerShape
from adapters.vector_bank import VectorBank

_LAYOUTS_KEPT = 32
_WEIGHT_BYTES = 4  # of a top-k weight


@dataclass(frozen=True, slots=True)
class TableSpec:
    """What fits a slot, chosen at load: a captured graph reads tables of one shape. `dtype` is of banks and factors."""

    rank: int
    topk: int
    vector_length: int
    num_vectors: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that read the same input, by name in the order in which they run."""

    names: tuple[str, ...]
    shape: GroupShape


class ModelTables(Protocol):
    """The tables of one pair. The thread that owns the model writes them, between two steps."""

    slots: int

    @property
    def tables(self) -> Sequence[SelectionTable | FactorTable]:
        """Of each group."""
        ...

    def put(self, slot: int, adapter: AdapterFactors) -> None:
        """Fills a slot. Raises DoesNotFit, and then the slot is as it was."""
        ...

    def clear(self, slot: int) -> None:
        """Rows that run with this slot are the base's from now on."""
        ...

    def deltas(self, rows: RowTable, kernels: PairKernels | None = None) -> list[GroupDelta]:
        """The kernels of each group over these rows, Triton's unless others stand in. Raises TritonMissing."""
        ...


class SelectionTables:
    """Implements ModelTables. The selections of all groups lie side by side, so that a slot is filled by few copies."""

    def __init__(self, groups: Sequence[LayerGroup], spec: TableSpec, slots: int, device: torch.device) -> None:
        self.slots = slots
        self._groups = groups
        self._banks = BankTable(slots, spec.num_vectors, spec.vector_length, dtype=spec.dtype, device=device)
        positions = [positions_of(group.shape, spec.vector_length, spec.rank) for group in groups]
        self._positions = list(_spans(positions))
        projections = list(_spans([group.shape.projections for group in groups]))
        self._storage = SelectionStorage.empty(
            self._banks,
            slots=slots,
            positions=sum(positions),
            projections=projections[-1].stop if groups else 0,
            topk=spec.topk,
        )
        self.tables = [
            SelectionTable(
                group.shape,
                self._banks,
                slots=slots,
                rank=spec.rank,
                topk=spec.topk,
                storage=self._storage.part(*spans),
            )
            for group, *spans in zip(groups, self._positions, projections, strict=True)
        ]
        self._placements: list[tuple[AdapterLayout, int, Placement]] = []  # of layouts seen: families share theirs
        self._place_of: dict[int, int] = {}  # which bank a slot reads
        self._readers: Counter[int] = Counter()  # of each place's bank
        self._free_places = list(range(slots))
        self._places: WeakKeyDictionary[VectorBank, int] = WeakKeyDictionary()
        self._banks_at: dict[int, ref[VectorBank]] = {}

    @staticmethod
    def slot_bytes(groups: Sequence[LayerGroup], spec: TableSpec) -> int:
        """What a slot takes, with a bank of its own."""
        positions = sum(positions_of(group.shape, spec.vector_length, spec.rank) for group in groups)
        bank = spec.num_vectors * spec.vector_length * spec.dtype.itemsize
        return positions * spec.topk * (index_dtype(spec.num_vectors).itemsize + _WEIGHT_BYTES) + bank

    def put(self, slot: int, adapter: AdapterFactors) -> None:
        checkpoint = adapter.selections
        if checkpoint is None:
            raise DoesNotFit("it is a plain LoRA, and the kernels read selections of a vector bank")
        _check_layers(adapter, self._groups)
        pieces = self._banks.pieces(checkpoint.bank)
        placement = self._placement(checkpoint.layout, pieces)
        self.clear(slot)
        place = self._place_of[slot] = self._place(checkpoint.bank)
        self._storage.put(slot, checkpoint, placement, pieces=pieces, place=place)

    def clear(self, slot: int) -> None:
        self._storage.ranks[slot].zero_()
        if (place := self._place_of.pop(slot, None)) is not None:
            self._readers[place] -= 1
            if not self._readers[place]:
                self._free_places.append(place)
                if (bank := self._banks_at.pop(place)()) is not None:
                    del self._places[bank]

    def deltas(self, rows: RowTable, kernels: PairKernels | None = None) -> list[GroupDelta]:
        scratch = _scratch(self.tables, rows)
        return [
            GroupDelta(rows, selections=table, choice=Pair.BANK_DIRECT, kernels=kernels, scratch=scratch)
            for table in self.tables
        ]

    def _placement(self, layout: AdapterLayout, pieces: int) -> Placement:
        for known, cut, placement in self._placements:
            if known is layout and cut == pieces:
                return placement
        placement = Placement.side_by_side(
            [
                table.placement(layout, group.names, pieces)
                for table, group in zip(self.tables, self._groups, strict=True)
            ],
            [span.start for span in self._positions],
        )
        self._placements = [(layout, pieces, placement), *self._placements][:_LAYOUTS_KEPT]
        return placement

    def _place(self, bank: VectorBank) -> int:
        """Where the bank is: adapters on one share it. Every slot reads one place, so there always is one left."""
        place = self._places.get(bank)
        if place is None:
            place = self._free_places.pop()
            self._banks.put(place, bank)
            self._places[bank], self._banks_at[place] = place, ref(bank)
        self._readers[place] += 1
        return place


class FactorTables:
    """Implements ModelTables."""

    def __init__(self, groups: Sequence[LayerGroup], spec: TableSpec, slots: int, device: torch.device) -> None:
        self.slots = slots
        self._groups = groups
        self.tables = [
            FactorTable(group.shape, slots=slots, rank=spec.rank, dtype=spec.dtype, device=device) for group in groups
        ]

    @staticmethod
    def slot_bytes(groups: Sequence[LayerGroup], spec: TableSpec) -> int:
        features = sum(g.shape.projections * g.shape.in_features + g.shape.total_out for g in groups)
        return features * spec.rank * spec.dtype.itemsize

    def put(self, slot: int, adapter: AdapterFactors) -> None:
        _check_layers(adapter, self._groups)
        by_group = []
        for table, group in zip(self.tables, self._groups, strict=True):
            layers = [adapter.layers.get(name) for name in group.names]
            factors = [None if layer is None else (layer.a, layer.b_t) for layer in layers]
            table.check(factors)
            by_group.append(factors)
        for table, factors in zip(self.tables, by_group, strict=True):
            table.put(slot, factors)

    def clear(self, slot: int) -> None:
        for table in self.tables:
            table.clear(slot)

    def deltas(self, rows: RowTable, kernels: PairKernels | None = None) -> list[GroupDelta]:
        scratch = _scratch(self.tables, rows)
        return [
            GroupDelta(rows, factors=table, choice=Pair.GATHERED, kernels=kernels, scratch=scratch)
            for table in self.tables
        ]


TABLES: Mapping[Pair, type[SelectionTables] | type[FactorTables]] = {
    Pair.BANK_DIRECT: SelectionTables,
    Pair.GATHERED: FactorTables,
}


def layer_groups(
    layers: Mapping[str, LayerShape], siblings: Mapping[str, Sequence[str]], *, vector_length: int
) -> list[LayerGroup]:
    """The groups that vectors of this length tile, of `layers` by name; `siblings` as of `AdaptedModel`."""
    groups: dict[tuple[str, ...], LayerGroup] = {}
    for name in layers:
        names = tuple(each for each in siblings.get(name, (name,)) if each in layers)
        shape = GroupShape(layers[name].in_features, tuple(layers[each].out_features for each in names))
        if all(features % vector_length == 0 for features in (shape.in_features, *shape.out_features)):
            groups[names] = LayerGroup(names, shape)
    return list(groups.values())


def _check_layers(adapter: AdapterFactors, groups: Sequence[LayerGroup]) -> None:
    if adapter.replaced:
        raise DoesNotFit("it has trained biases or saved modules, which rows run one group after the other")
    if missing := adapter.layers.keys() - {name for group in groups for name in group.names}:
        raise DoesNotFit(f"it adapts {min(missing)}, which the tables leave out")


def _scratch(tables: Sequence[SelectionTable] | Sequence[FactorTable], rows: RowTable) -> Tensor:
    """One for all groups: they run one after the other."""
    return torch.empty(max((scratch_size(table, rows) for table in tables), default=0), device=rows.slots.device)


def _spans(sizes: Sequence[int]) -> Iterator[slice]:
    for stop, size in zip(accumulate(sizes), sizes, strict=True):
        yield slice(stop - size, stop)
