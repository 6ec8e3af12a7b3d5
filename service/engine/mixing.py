"""The low-rank part of the rows that run: who brings what with which weight, kept from step to step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

import torch

from adapters.factors import AdapterFactors, FactorStack
from adapters.low_rank import LowRankBatch
from service.engine.sequence import Sequence

_MIXES_KEPT = 4
_IDLE_RANKS = 512  # a stack that has grown beyond it is let go of when nothing runs


class Mixing:
    """Makes the low-rank batch of some rows. `factors_of` gives a row's adapters, in its selection's order."""

    def __init__(self, stack: FactorStack, factors_of: Callable[[Sequence], Seq[AdapterFactors]]) -> None:
        self._stack = stack
        self._factors_of = factors_of
        self._mixes: OrderedDict[object, LowRankBatch | None] = OrderedDict()

    def batch(self, sequences: Seq[Sequence], running: Seq[Sequence]) -> LowRankBatch | None:
        """The low-rank part for these rows, kept from earlier steps whose rows had the same selections."""
        # All rows that run, not only these: a step's forwards must not push each other's adapters out.
        self._stack.hold(self._by_digest(running).values())
        mix = self._stack.generation, tuple(sequence.selection.key for sequence in sequences)
        if mix not in self._mixes:
            self._mixes[mix] = self._mixed(sequences)
        self._mixes.move_to_end(mix)
        while len(self._mixes) > _MIXES_KEPT:
            self._mixes.popitem(last=False)
        return self._mixes[mix]

    def let_go(self) -> None:
        """When nothing runs: lets go of factors that may be evicted now."""
        self._mixes.clear()
        if self._stack.ranks > _IDLE_RANKS:
            self._stack.clear()

    def _mixed(self, sequences: Seq[Sequence]) -> LowRankBatch | None:
        factors = self._by_digest(sequences)
        if not factors:
            return None
        column = {digest: i for i, digest in enumerate(factors)}
        weights = torch.zeros(len(sequences), len(factors))
        for row, sequence in enumerate(sequences):
            for adapter in sequence.selection.adapters:
                weights[row, column[adapter.digest]] += adapter.weight
        return LowRankBatch(list(factors.values()), weights, self._stack)

    def _by_digest(self, sequences: Iterable[Sequence]) -> dict[str, AdapterFactors]:
        return {factors.digest: factors for sequence in sequences for factors in self._factors_of(sequence)}
