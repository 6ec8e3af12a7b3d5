"""The low-rank part of a batch: what one forward adds to each layer, for any mix of adapters.

The factors of the adapters present are stacked along the rank (`FactorStack`). `h = [A_1 … A_K] x` is weighed per row
(by zero where the row does not use an adapter), and `y += [B_1 … B_K] h`: a blend is just a row with several weights.
`adapters.products` computes both, for few adapters and for many. Layers that read the same input share the first
product.

The low-rank part is computed in float32 whatever the model's dtype, and the sum is rounded once. PEFT does the same;
computing it in the model's 16-bit dtype costs up to 1.5 times PEFT's largest error on token logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from adapters.factors import AdapterFactors, FactorStack, Shelf
from adapters.packed import own_value
from adapters.products import products_for
from adapters.replacements import Parameters, RowReplacements, blended, origin

_SPARSE = 2  # times the ranks in use: a longer run of the stack is gathered instead of computed whole


@dataclass(frozen=True, slots=True, eq=False)
class _SiblingFactors:
    """A shelf's factors of the ranks in this batch: `a` [R · layers, in_features], `b_t` each [R, out_features]."""

    a: Tensor
    b_t: tuple[Tensor, ...]


class LowRankBatch:
    """The low-rank part of one forward: the adapters present and each row's weight of each.

    `weights` [rows, adapters], float; a single row stands for all rows of the batch. `stack` is where factors are kept
    from batch to batch; a batch is no good any more once the stack's `generation` has changed.
    """

    def __init__(self, adapters: Sequence[AdapterFactors], weights: Tensor, stack: FactorStack | None = None) -> None:
        assert weights.shape[1] == len(adapters)
        self.adapters = tuple(adapters)
        self.weights = weights
        self._stack = stack if stack is not None else FactorStack()
        self._stack.hold(self.adapters)
        self._ranks, by_rank, spans = self._ranks_used()
        self._products = products_for(by_rank, spans)
        self._parts: dict[str, tuple[_SiblingFactors, int] | None] = {}
        self._taken: dict[str, _SiblingFactors] = {}  # by the first sibling
        self._replacements: dict[str, RowReplacements | None] = {}
        self.forget_input()

    @property
    def stacked(self) -> frozenset[str]:
        """The digests of all adapters that have a place in the stack, those of this batch among them."""
        return self._stack.held

    def forget_input(self) -> None:
        """Between forwards: the next one's tensors may be the same objects with other contents."""
        self._input: Tensor | None = None
        self._shared: tuple[_SiblingFactors, Sequence[Tensor]] | None = None

    def add_delta(self, name: str, output: Tensor, x: Tensor) -> Tensor:
        """`output + Δ(x)` of one layer, in place where it can be.

        x and output [rows, …, features], or flattened to [rows · tokens, features].
        """
        if name not in self._parts:
            self._parts[name] = self._part(name)
        part = self._parts[name]
        if part is None:
            return output
        siblings, place = part
        h, b_t = self._shrunk(siblings, x)[place], siblings.b_t[place]
        if output.dtype is torch.float32 and output.is_contiguous():
            self._products.expand(output.view(-1, output.shape[-1]), h, b_t)
            return output
        wide = output.float().reshape(-1, output.shape[-1])
        wide = wide.clone() if wide.data_ptr() == output.data_ptr() else wide
        self._products.expand(wide, h, b_t)
        return wide.to(output.dtype).view(output.shape)

    def replacements(self, name: str, module: nn.Module) -> RowReplacements | None:
        """Which rows run a module of the base with other parameters, None if none does."""
        if name not in self._replacements:
            self._replacements[name] = self._grouped(name, module)
        return self._replacements[name]

    # --- the two products -------------------------------------------------------------------------

    def _shrunk(self, siblings: _SiblingFactors, x: Tensor) -> Sequence[Tensor]:
        """x @ Aᵀ of a layer and its siblings, weighed by row: each [rows · tokens, R]. Computed by the first."""
        if self._shared is not None and self._input is x and self._shared[0] is siblings:
            return self._shared[1]
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if flat.dtype is torch.float32 else flat.float()
        by_layer = self._products.shrink(siblings.a, len(siblings.b_t), flat)
        self._input, self._shared = x, (siblings, by_layer)
        return by_layer

    def _ranks_used(self) -> tuple[slice | Tensor, Tensor, list[tuple[int, int]]]:
        """The ranks of the stack that take part; among these, each row's weight [R, rows], and each adapter's span."""
        held = [self._stack.span(adapter) for adapter in self.adapters]
        used = sorted({(span.start, span.stop) for span in held if span.start < span.stop})
        start, stop = min((s for s, _ in used), default=0), max((s for _, s in used), default=0)
        owned = torch.zeros(stop - start, len(held))  # 1 where a rank is an adapter's
        for column, span in enumerate(held):
            owned[span.start - start : span.stop - start, column] = 1.0
        by_rank = owned @ self.weights.float().T
        if stop - start <= _SPARSE * sum(b - a for a, b in used):
            return slice(start, stop), by_rank, [(a - start, b - start) for a, b in used]
        ranks = torch.tensor([rank for a, b in used for rank in range(a, b)])
        stops = list(accumulate(b - a for a, b in used))
        return ranks, by_rank[ranks - start], list(pairwise([0, *stops]))

    def _part(self, name: str) -> tuple[_SiblingFactors, int] | None:
        """A layer's factors and its place among its siblings; None if no adapter present adapts it."""
        if not any(name in adapter.layers for adapter in self.adapters):
            return None
        shelf = self._stack.shelf(name)
        if shelf.names[0] not in self._taken:
            self._taken[shelf.names[0]] = self._of_batch(shelf)
        return self._taken[shelf.names[0]], shelf.names.index(name)

    def _of_batch(self, shelf: Shelf) -> _SiblingFactors:
        ranks = self._ranks if isinstance(self._ranks, slice) else self._ranks.to(shelf.a.device)
        return _SiblingFactors(shelf.a[ranks].flatten(0, 1), tuple(b_t[ranks] for b_t in shelf.b_t))

    # --- replaced parameters ----------------------------------------------------------------------

    def _grouped(self, name: str, module: nn.Module) -> RowReplacements | None:
        replacing = [i for i, adapter in enumerate(self.adapters) if name in adapter.replaced]
        if not replacing:
            return None
        rows_of: dict[tuple[float, ...], list[int]] = {}
        for row, weights in enumerate(self.weights[:, replacing].tolist()):
            if any(weights):
                rows_of.setdefault(tuple(weights), []).append(row)
        groups = []
        for weights, members in rows_of.items():
            parts = [(self.adapters[i].replaced[name], w) for i, w in zip(replacing, weights, strict=True) if w]
            attributes = {attribute for parameters, _ in parts for attribute in parameters}
            values = {attribute: _blended_parameter(module, attribute, parts) for attribute in attributes}
            groups.append((None if len(members) == len(self.weights) else members, values))
        return RowReplacements(len(self.weights), groups) if groups else None


def _blended_parameter(module: nn.Module, attribute: str, parts: Sequence[tuple[Parameters, float]]) -> Tensor:
    own = own_value(module, attribute)
    values = [(parameters[attribute], weight) for parameters, weight in parts if attribute in parameters]
    return blended(origin(own, [value for value, _ in values]), values)
