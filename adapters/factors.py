"""Factors as forwards need them: one adapter's, and those of all adapters in use, stacked along the rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters.checkpoint import TopKCheckpoint
from adapters.replacements import Parameters
from adapters.vector_bank import VectorBank

if TYPE_CHECKING:
    from adapters.lora import ServedCheckpoint

_LEAST_RANKS = 16


@dataclass(frozen=True, slots=True, eq=False)
class LayerFactors:
    """One layer's factors: `a` [r, in_features] and `b_t` = Bᵀ [r, out_features], float32 on the model's device."""

    a: Tensor
    b_t: Tensor


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AdapterFactors:
    """What one adapter computes with: its factors by layer name, and by module name the parameters it replaces.

    `replaced` are trained biases and saved modules, in the base's dtype. `bank` is what the factors were composed from,
    on their device: held so that the next adapter that has it finds it there. `selections` is the compact adapter with
    that bank, None of a plain LoRA. Where the base is held in parts, `whole` is what the others compose theirs from.
    """

    digest: str
    layers: Mapping[str, LayerFactors]
    replaced: Mapping[str, Parameters] = field(default_factory=dict)
    bank: VectorBank | None = None
    selections: TopKCheckpoint | None = None
    whole: ServedCheckpoint | None = None

    def head_alone(self, output: str) -> AdapterFactors:
        """What is left to run beside the weights when it is folded in: its own layer of that name, if it has one."""
        own = {name: parameters for name, parameters in self.replaced.items() if name == output}
        return AdapterFactors(self.digest, {}, own)

    @property
    def rank(self) -> int:
        """The ranks that it needs in a stack: as many as its largest layer has."""
        return max((len(factors.a) for factors in self.layers.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory that are this adapter's alone."""
        replaced = sum(t.nbytes for parameters in self.replaced.values() for t in parameters.values())
        return replaced + sum(layer.a.nbytes + layer.b_t.nbytes for layer in self.layers.values())


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """The stacked factors of layers that read the same input, `names`.

    `a` [ranks, layers, in_features], so that a run of ranks is one matrix [ranks · layers, in_features];
    `b_t` one for each layer, [ranks, out_features].
    """

    names: tuple[str, ...]
    a: Tensor
    b_t: tuple[Tensor, ...]

    def put(self, span: slice, adapter: AdapterFactors) -> None:
        """Writes an adapter's factors into its span, zeros where it has none."""
        for place, name in enumerate(self.names):
            factors = adapter.layers.get(name)
            rank = 0 if factors is None else len(factors.a)
            if factors is not None:
                self.a[span.start : span.start + rank, place] = factors.a
                self.b_t[place][span.start : span.start + rank] = factors.b_t
            if span.start + rank < span.stop:
                self.a[span.start + rank : span.stop, place] = 0
                self.b_t[place][span.start + rank : span.stop] = 0


class FactorStack:
    """The factors of the adapters in use, side by side along the rank, so that a batch multiplies by all at once.

    Each adapter has a span of ranks, the same in every layer, and stays after its last row has left until the place is
    needed: an adapter that joins costs one copy of its own factors, not of everybody's. `siblings` names, for a layer,
    the layers that read the same input, itself among them; layers it does not name stand alone.

    Not thread-safe: the model's thread owns it.
    """

    def __init__(self, siblings: Mapping[str, Sequence[str]] | None = None) -> None:
        self._siblings = siblings or {}
        self._capacity = 0
        self._spans: dict[str, slice] = {}
        self._shelves: dict[str, Shelf] = {}  # by layer
        self.generation = 0  # counts the times that something held before was moved or dropped

    @property
    def ranks(self) -> int:
        """How many ranks there is memory for."""
        return self._capacity

    @property
    def held(self) -> frozenset[str]:
        """The digests of the adapters that have a place."""
        return frozenset(self._spans)

    def span(self, adapter: AdapterFactors) -> slice:
        """The ranks of an adapter that is held."""
        return self._spans[adapter.digest]

    def shelf(self, layer: str) -> Shelf:
        """Where the factors of a layer are that some adapter held adapts."""
        return self._shelves[layer]

    @torch.inference_mode(mode=False)  # what is made here is written to later, in whatever mode
    def hold(self, adapters: Iterable[AdapterFactors]) -> None:
        """Makes sure that all of these are held; others may lose their place."""
        wanted = {adapter.digest: adapter for adapter in adapters}
        new = [adapter for digest, adapter in wanted.items() if digest not in self._spans]
        if not new:
            return
        if not self._place(new):
            self._drop(wanted.keys())
            if not self._place(new):
                self._rebuild(wanted)

    def clear(self) -> None:
        """Gives all memory back."""
        self._capacity = 0
        self._spans, self._shelves = {}, {}
        self.generation += 1

    def _place(self, adapters: Sequence[AdapterFactors]) -> bool:
        """Finds a span for each of these and fills it; False, and nothing has changed, where room or a layer lacks."""
        if any(adapter.layers.keys() - self._shelves.keys() for adapter in adapters):
            return False
        spans = dict(self._spans)
        for adapter in adapters:
            start = _gap(spans.values(), adapter.rank, self._capacity)
            if start is None:
                return False
            spans[adapter.digest] = slice(start, start + adapter.rank)
        self._spans = spans
        for shelf in {id(shelf): shelf for shelf in self._shelves.values()}.values():
            for adapter in adapters:
                shelf.put(spans[adapter.digest], adapter)
        return True

    def _drop(self, wanted: Iterable[str]) -> None:
        """Forgets whom nobody wants now."""
        wanted = set(wanted)
        if self._spans.keys() - wanted:
            self._spans = {digest: span for digest, span in self._spans.items() if digest in wanted}
            self.generation += 1

    def _rebuild(self, adapters: Mapping[str, AdapterFactors]) -> None:
        """New shelves, for these adapters and no others, with some room to grow."""
        self.clear()
        self._capacity = _LEAST_RANKS
        while self._capacity < sum(adapter.rank for adapter in adapters.values()):
            self._capacity *= 2
        shapes: dict[str, LayerFactors] = {}
        for adapter in adapters.values():
            shapes.update(adapter.layers)
        for name in shapes:
            if name not in self._shelves:
                names = tuple(each for each in self._siblings.get(name, (name,)) if each in shapes)
                self._shelves.update(dict.fromkeys(names, self._shelf(names, shapes)))
        placed = self._place(list(adapters.values()))
        assert placed, "the stack was made large enough"

    def _shelf(self, names: tuple[str, ...], shapes: Mapping[str, LayerFactors]) -> Shelf:
        like = shapes[names[0]].a
        a = like.new_zeros(self._capacity, len(names), like.shape[1])
        return Shelf(names, a, tuple(like.new_zeros(self._capacity, shapes[name].b_t.shape[1]) for name in names))


def _gap(spans: Iterable[slice], length: int, capacity: int) -> int | None:
    """Where the first gap of this length between spans begins."""
    start = 0
    for span in sorted(spans, key=lambda span: span.start):
        if span.start - start >= length:
            return start
        start = max(start, span.stop)
    return start if capacity - start >= length else None
