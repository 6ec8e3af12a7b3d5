"""The low-rank part of a batch: what one forward adds to each layer, for any mix of adapters.

The factors of the adapters present are stacked along the rank (`FactorStack`). `h = [A_1 … A_K] @ xᵀ` is scaled per row
by that row's weights (zero where the row does not use an adapter), and `y += hᵀ @ [B_1 … B_K]ᵀ`: two products whatever
the mix, and a blend is just a row with several weights. Layers that read the same input share the first product.

The low-rank part is computed in float32 whatever the model's dtype, and the sum is rounded once. PEFT does the same;
computing it in the model's 16-bit dtype costs up to 1.5 times PEFT's largest error on token logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.factors import AdapterFactors, FactorStack, Shelf
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
        self._ranks, by_rank = self._ranks_used()
        # Not even multiplied where nothing is to be weighed: one adapter in every row is the common case.
        self._by_rank = None if bool((by_rank == 1).all()) else by_rank
        self._by_token: Tensor | None = None
        self._parts: dict[str, tuple[_SiblingFactors, int] | None] = {}
        self._taken: dict[str, _SiblingFactors] = {}  # by the first sibling
        self._replacements: dict[str, RowReplacements | None] = {}
        self.forget_input()

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
            output.view(-1, output.shape[-1]).addmm_(h, b_t)
            return output
        wide = output.reshape(-1, output.shape[-1]).float()
        return torch.addmm(wide, h, b_t).to(output.dtype).view(output.shape)

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
        h = torch.mm(siblings.a, flat.t()).view(-1, len(siblings.b_t), len(flat))  # [R, layers, rows · tokens]
        if self._by_rank is not None:
            h.mul_(self._for_tokens(len(flat), x.device).unsqueeze(1))
        by_layer = h.permute(1, 2, 0).unbind(0)
        self._input, self._shared = x, (siblings, by_layer)
        return by_layer

    def _for_tokens(self, tokens: int, device: torch.device) -> Tensor:
        """Each token's weight of each rank, [R, tokens], or [R, 1] for all."""
        assert self._by_rank is not None
        if self._by_token is None or self._by_token.shape[1] not in (1, tokens):
            rows = self._by_rank.shape[1]
            assert tokens % rows == 0, f"a layer received {tokens} tokens for a batch of {rows} rows"
            by_row = self._by_rank.to(device, torch.float32)
            self._by_token = by_row if rows == 1 else by_row.repeat_interleave(tokens // rows, 1)
        return self._by_token

    def _ranks_used(self) -> tuple[slice | Tensor, Tensor]:
        """The ranks of the stack that take part, and each row's weight of each of them [R, rows]."""
        spans = [self._stack.span(adapter) for adapter in self.adapters]
        used = {(span.start, span.stop) for span in spans if span.start < span.stop}
        start, stop = min((s for s, _ in used), default=0), max((s for _, s in used), default=0)
        owned = torch.zeros(stop - start, len(spans))  # 1 where a rank is an adapter's
        for column, span in enumerate(spans):
            owned[span.start - start : span.stop - start, column] = 1.0
        by_rank = owned @ self.weights.float().T
        needed = sum(b - a for a, b in used)
        if stop - start <= _SPARSE * needed:
            return slice(start, stop), by_rank
        ranks = torch.tensor([rank for a, b in sorted(used) for rank in range(a, b)])
        return ranks, by_rank[ranks - start]

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
    own: Tensor = getattr(module, attribute)
    values = [(parameters[attribute], weight) for parameters, weight in parts if attribute in parameters]
    return blended(origin(own, [value for value, _ in values]), values)
