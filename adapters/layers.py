"""The adapted linear layer: the base layer's output plus the low-rank part of every row's own selection.

One forward serves any mix of adapters. For the K adapters present in a batch the factors are concatenated along the
rank, `h = x @ [A_1 … A_K]ᵀ` is scaled per row by that row's weights (zero where the row does not use an adapter), and
`y += h @ [B_1 … B_K]ᵀ`: two products whatever the mix, and a blend is just a row with several weights.

The low-rank part is computed in float32 whatever the model's dtype, and the sum is rounded once. PEFT does the same;
computing it in the model's 16-bit dtype costs up to 1.5 times PEFT's largest error on token logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.replacements import Parameters, RowReplacements, blended, is_replaceable
from adapters.targets import BaseModules


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


@dataclass(frozen=True, slots=True, eq=False)
class _LayerMix:
    """What one forward adds to one layer. R is the rank of all adapters present in that layer together."""

    a: Tensor  # [R, in_features]
    b_t: Tensor  # [R, out_features]
    weights: Tensor  # [rows, R]: the row's weight of the adapter that each rank column belongs to

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        h = F.linear(x.float(), self.a)  # [..., R]
        weights = self._aligned(h)
        # Masked, not multiplied by 0: an overflow in one row's adapter must not become NaN in its neighbour's row.
        h = torch.where(weights != 0, h * weights, 0.0)
        return (output.float() + h @ self.b_t).to(output.dtype)

    def _aligned(self, h: Tensor) -> Tensor:
        """The weights, shaped so that they broadcast over `h` [rows, …, R] or [rows · tokens, R]."""
        rows = self.weights.shape[0]
        if rows == 1:
            return self.weights[0]
        if h.shape[0] == rows:
            return self.weights.reshape(rows, *[1] * (h.dim() - 2), -1)
        if h.dim() == 2 and h.shape[0] % rows == 0:
            # Some models flatten [rows, tokens] before a linear layer (OPT's feed-forward).
            return self.weights.repeat_interleave(h.shape[0] // rows, dim=0)
        raise AssertionError(f"a layer received {tuple(h.shape)} for a batch of {rows} rows")


class LowRankBatch:
    """The low-rank part of one forward: the adapters present and each row's weight of each.

    `weights` [rows, K], float; a single row stands for all rows of the batch. The concatenation for a layer is made
    when the layer first asks and kept as long as the batch.
    """

    def __init__(self, adapters: Sequence[AdapterFactors], weights: Tensor) -> None:
        assert weights.shape[1] == len(adapters)
        self._adapters = adapters
        self.weights = weights
        self._mixes: dict[str, _LayerMix | None] = {}
        self._replacements: dict[str, RowReplacements | None] = {}

    def mix(self, layer: str) -> _LayerMix | None:
        """What to add in `layer`, None if no adapter present adapts it."""
        if layer not in self._mixes:
            self._mixes[layer] = self._concatenate(layer)
        return self._mixes[layer]

    def replacements(self, name: str, module: nn.Module) -> RowReplacements | None:
        """Which rows run a module of the base with other parameters, None if none does."""
        if name not in self._replacements:
            self._replacements[name] = self._grouped(name, module)
        return self._replacements[name]

    def _grouped(self, name: str, module: nn.Module) -> RowReplacements | None:
        replacing = [i for i, adapter in enumerate(self._adapters) if name in adapter.replaced]
        if not replacing:
            return None
        rows_of: dict[tuple[float, ...], list[int]] = {}
        for row, weights in enumerate(self.weights[:, replacing].tolist()):
            if any(weights):
                rows_of.setdefault(tuple(weights), []).append(row)
        rows = len(self.weights)
        groups = []
        for weights, members in rows_of.items():
            parts = [(self._adapters[i].replaced[name], w) for i, w in zip(replacing, weights, strict=True) if w]
            attributes = {attribute for parameters, _ in parts for attribute in parameters}
            values = {a: _blended_parameter(module, a, parts) for a in attributes}
            groups.append((None if len(members) == rows else members, values))
        return RowReplacements(rows, groups) if groups else None

    def _concatenate(self, layer: str) -> _LayerMix | None:
        present = [(i, adapter.layers[layer]) for i, adapter in enumerate(self._adapters) if layer in adapter.layers]
        if not present:
            return None
        columns = [self.weights[:, i : i + 1].expand(-1, len(factors.a)) for i, factors in present]
        a = torch.cat([factors.a for _, factors in present]) if len(present) > 1 else present[0][1].a
        b_t = torch.cat([factors.b_t for _, factors in present]) if len(present) > 1 else present[0][1].b_t
        return _LayerMix(a, b_t, torch.cat(columns, dim=1).to(a.device, torch.float32))


def _blended_parameter(module: nn.Module, attribute: str, parts: Sequence[tuple[Parameters, float]]) -> Tensor:
    own: Tensor = getattr(module, attribute)
    return blended(own, [(parameters[attribute], weight) for parameters, weight in parts if attribute in parameters])


class AdaptedModule(nn.Module):
    """A leaf of the base model that runs every row with its own parameters and, if linear, adds its low-rank part."""

    def __init__(self, base_layer: nn.Module, name: str, model: AdaptedModel) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._name = name
        # In a list, so that the module tree stays a tree: the model must not become a submodule of its own layer.
        self._model = [model]

    def forward(self, x: Tensor) -> Tensor:
        batch = self._model[0].batch
        if batch is None:
            plain: Tensor = self.base_layer(x)
            return plain
        replacements = batch.replacements(self._name, self.base_layer)
        output: Tensor = self.base_layer(x) if replacements is None else replacements.run(self.base_layer, x)
        mix = batch.mix(self._name)
        return output if mix is None else mix.add_to(output, x)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Models read `weight`, `bias` or `in_features` of their own layers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)  # type: ignore[no-any-return]


class AdaptedModel:
    """A base model whose leaves take part in low-rank batches.

    Wraps every Linear, Conv1D, Embedding and norm of `model` in place. The thread that owns the model sets the batch
    for each forward:

        with adapted.using(LowRankBatch(factors, weights)):
            model(...)
    """

    def __init__(self, model: nn.Module, modules: BaseModules) -> None:
        self.model = model
        self.modules = modules
        self.batch: LowRankBatch | None = None
        self.pristine: dict[str, Tensor] = {}  # copies on the host of the parameters that a Merger changes
        self._leaves: dict[str, nn.Module] = {
            name: module for name, module in model.named_modules() if name in modules.layers or is_replaceable(module)
        }
        for name, leaf in self._leaves.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, AdaptedModule(leaf, name, self))

    def base_layer(self, name: str) -> nn.Module:
        """The base model's own leaf, as it was before wrapping."""
        return self._leaves[name]

    def can_replace(self, name: str) -> bool:
        """Whether the parameters of this module may differ from row to row."""
        return name in self._leaves

    def tensor(self, name: str) -> Tensor | None:
        """The base model's parameter or buffer called `name` (`lm_head.weight`), None if it has none.

        Of a weight that is folded at the moment, the pristine one.
        """
        if name in self.pristine:
            return self.pristine[name]
        module, _, attribute = name.rpartition(".")
        try:
            owner = self._leaves.get(module) or self.model.get_submodule(module)
        except AttributeError:
            return None
        value = getattr(owner, attribute, None)
        return value if isinstance(value, Tensor) else None

    @contextmanager
    def using(self, batch: LowRankBatch | None) -> Iterator[None]:
        previous, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = previous
