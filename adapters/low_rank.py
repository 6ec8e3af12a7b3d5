"""The low-rank part of a batch: what one forward adds to each layer, for any mix of adapters.

For the K adapters present the factors are stacked along the rank, `h = x @ [A_1 … A_K]ᵀ` is scaled per row by that
row's weights (zero where the row does not use an adapter), and `y += h @ [B_1 … B_K]ᵀ`: two products whatever the mix,
and a blend is just a row with several weights.

The low-rank part is computed in float32 whatever the model's dtype, and the sum is rounded once. PEFT does the same;
computing it in the model's 16-bit dtype costs up to 1.5 times PEFT's largest error on token logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.replacements import Parameters, RowReplacements, blended


@dataclass(frozen=True, slots=True, eq=False)
class LayerFactors:
    """One layer's factors: `a` [r, in_features] and `b_t` = Bᵀ [r, out_features], float32 on the model's device."""

    a: Tensor
    b_t: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFactors:
    """What one adapter computes with: its factors by layer name, and by module name the parameters it replaces.

    `replaced` are trained biases and saved modules, in the base's dtype.
    """

    digest: str
    layers: Mapping[str, LayerFactors]
    replaced: Mapping[str, Parameters] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        replaced = sum(t.nbytes for parameters in self.replaced.values() for t in parameters.values())
        return replaced + sum(layer.a.nbytes + layer.b_t.nbytes for layer in self.layers.values())


class FactorStack:
    """The factors of some adapters, stacked along the rank, layer by layer as each is first needed.

    It depends on the adapters alone, not on which row uses which, so it outlives the batches it is used in.
    """

    def __init__(self, adapters: Sequence[AdapterFactors]) -> None:
        self.adapters = tuple(adapters)
        self.column = {adapter.digest: i for i, adapter in enumerate(self.adapters)}
        self._layers: dict[str, tuple[LayerFactors, Tensor] | None] = {}

    def layer(self, name: str) -> tuple[LayerFactors, Tensor] | None:
        """One layer's stacked factors, and the adapter (its column) that each of the R ranks belongs to, [R] int64.

        None if no adapter adapts the layer.
        """
        if name not in self._layers:
            self._layers[name] = self._stacked(name)
        return self._layers[name]

    def _stacked(self, name: str) -> tuple[LayerFactors, Tensor] | None:
        present = [(i, adapter.layers[name]) for i, adapter in enumerate(self.adapters) if name in adapter.layers]
        if not present:
            return None
        owner = torch.tensor([i for i, factors in present for _ in range(len(factors.a))])
        if len(present) == 1:
            return present[0][1], owner
        a = torch.cat([factors.a for _, factors in present])
        b_t = torch.cat([factors.b_t for _, factors in present])
        return LayerFactors(a, b_t), owner


class LayerMix:
    """What one forward adds to one layer, `weights` [rows, R] saying how much of each rank a row takes."""

    def __init__(self, factors: LayerFactors, weights: Tensor) -> None:
        self._a = factors.a
        self._b_t = factors.b_t
        self._rows = len(weights)
        # Not even multiplied where nothing is to be weighed: one adapter in every row is the common case.
        self._weights = None if bool((weights == 1).all()) else weights.to(factors.a.device, torch.float32)
        self._unused = self._weights == 0 if self._weights is not None and bool((weights == 0).any()) else None
        self._aligned: dict[int, tuple[Tensor, Tensor | None]] = {}

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """`output + Δ(x)`, for x and output [rows, …, features] or flattened to [rows · tokens, features]."""
        flat = x.reshape(-1, x.shape[-1])
        h = F.linear(flat if flat.dtype is torch.float32 else flat.float(), self._a)  # [rows · tokens, R]
        if self._weights is not None:
            weights, unused = self._for_tokens(len(h))
            h = h * weights
            if unused is not None:
                # An overflow in one row's adapter, times 0, would be NaN in its neighbour's row.
                h = h.masked_fill(unused, 0.0)
        wide = output.reshape(-1, output.shape[-1])
        wide = wide if wide.dtype is torch.float32 else wide.float()
        return torch.addmm(wide, h, self._b_t).to(output.dtype).view(output.shape)

    def _for_tokens(self, tokens: int) -> tuple[Tensor, Tensor | None]:
        """The weights and the mask, one row a token."""
        assert self._weights is not None
        if self._rows in (1, tokens):
            return self._weights, self._unused
        if tokens not in self._aligned:
            assert tokens % self._rows == 0, f"a layer received {tokens} tokens for a batch of {self._rows} rows"
            repeats = tokens // self._rows
            unused = None if self._unused is None else self._unused.repeat_interleave(repeats, 0)
            self._aligned[tokens] = self._weights.repeat_interleave(repeats, 0), unused
        return self._aligned[tokens]


class LowRankBatch:
    """The low-rank part of one forward: the adapters present and each row's weight of each.

    `weights` [rows, K], float; a single row stands for all rows of the batch. K counts the adapters of the stack, which
    may hold some that no row uses.
    """

    def __init__(self, adapters: Sequence[AdapterFactors] | FactorStack, weights: Tensor) -> None:
        self.stack = adapters if isinstance(adapters, FactorStack) else FactorStack(adapters)
        assert weights.shape[1] == len(self.stack.adapters)
        self.weights = weights
        self._mixes: dict[str, LayerMix | None] = {}
        self._replacements: dict[str, RowReplacements | None] = {}

    def mix(self, layer: str) -> LayerMix | None:
        """What to add in `layer`, None if no adapter present adapts it."""
        if layer not in self._mixes:
            stacked = self.stack.layer(layer)
            self._mixes[layer] = None if stacked is None else LayerMix(stacked[0], self.weights[:, stacked[1]])
        return self._mixes[layer]

    def replacements(self, name: str, module: nn.Module) -> RowReplacements | None:
        """Which rows run a module of the base with other parameters, None if none does."""
        if name not in self._replacements:
            self._replacements[name] = self._grouped(name, module)
        return self._replacements[name]

    def _grouped(self, name: str, module: nn.Module) -> RowReplacements | None:
        adapters = self.stack.adapters
        replacing = [i for i, adapter in enumerate(adapters) if name in adapter.replaced]
        if not replacing:
            return None
        rows_of: dict[tuple[float, ...], list[int]] = {}
        for row, weights in enumerate(self.weights[:, replacing].tolist()):
            if any(weights):
                rows_of.setdefault(tuple(weights), []).append(row)
        groups = []
        for weights, members in rows_of.items():
            parts = [(adapters[i].replaced[name], w) for i, w in zip(replacing, weights, strict=True) if w]
            attributes = {attribute for parameters, _ in parts for attribute in parameters}
            values = {attribute: _blended_parameter(module, attribute, parts) for attribute in attributes}
            groups.append((None if len(members) == len(self.weights) else members, values))
        return RowReplacements(len(self.weights), groups) if groups else None


def _blended_parameter(module: nn.Module, attribute: str, parts: Sequence[tuple[Parameters, float]]) -> Tensor:
    own: Tensor = getattr(module, attribute)
    return blended(own, [(parameters[attribute], weight) for parameters, weight in parts if attribute in parameters])
