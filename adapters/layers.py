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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.targets import BaseModules


@dataclass(frozen=True, slots=True, eq=False)
class LayerFactors:
    """One layer's factors: `a` [r, in_features] and `b_t` = Bᵀ [r, out_features], float32 on the model's device."""

    a: Tensor
    b_t: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFactors:
    """All factors of one adapter, by layer name."""

    digest: str
    layers: Mapping[str, LayerFactors]

    @property
    def nbytes(self) -> int:
        return sum(layer.a.nbytes + layer.b_t.nbytes for layer in self.layers.values())


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

    def mix(self, layer: str) -> _LayerMix | None:
        """What to add in `layer`, None if no adapter present adapts it."""
        if layer not in self._mixes:
            self._mixes[layer] = self._concatenate(layer)
        return self._mixes[layer]

    def _concatenate(self, layer: str) -> _LayerMix | None:
        present = [(i, adapter.layers[layer]) for i, adapter in enumerate(self._adapters) if layer in adapter.layers]
        if not present:
            return None
        columns = [self.weights[:, i : i + 1].expand(-1, len(factors.a)) for i, factors in present]
        a = torch.cat([factors.a for _, factors in present]) if len(present) > 1 else present[0][1].a
        b_t = torch.cat([factors.b_t for _, factors in present]) if len(present) > 1 else present[0][1].b_t
        return _LayerMix(a, b_t, torch.cat(columns, dim=1).to(a.device, torch.float32))


class AdaptedLinear(nn.Module):
    """A Linear or Conv1D of the base model that adds the current batch's low-rank part to its output."""

    def __init__(self, base_layer: nn.Module, name: str, model: AdaptedModel) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._name = name
        # In a list, so that the module tree stays a tree: the model must not become a submodule of its own layer.
        self._model = [model]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x)
        batch = self._model[0].batch
        mix = None if batch is None else batch.mix(self._name)
        return output if mix is None else mix.add_to(output, x)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Models read `weight`, `bias` or `in_features` of their own layers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)  # type: ignore[no-any-return]


class AdaptedModel:
    """A base model whose linear layers take part in low-rank batches.

    Wraps every Linear and Conv1D of `model` in place. The thread that owns the model sets the batch for each forward:

        with adapted.using(LowRankBatch(factors, weights)):
            model(...)
    """

    def __init__(self, model: nn.Module, modules: BaseModules) -> None:
        self.model = model
        self.modules = modules
        self.batch: LowRankBatch | None = None
        self.pristine: dict[str, Tensor] = {}  # copies on the host of the weights that a Merger changes, by layer
        self._layers = {name: model.get_submodule(name) for name in modules.layers}
        for name, layer in self._layers.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, AdaptedLinear(layer, name, self))

    def base_layer(self, name: str) -> nn.Module:
        """The base model's own layer, as it was before wrapping."""
        return self._layers[name]

    def tensor(self, name: str) -> Tensor | None:
        """The base model's parameter or buffer called `name` (`lm_head.weight`), None if it has none.

        Of a weight that is folded at the moment, the pristine one.
        """
        module, _, attribute = name.rpartition(".")
        if attribute == "weight" and module in self.pristine:
            return self.pristine[module]
        try:
            owner = self._layers.get(module) or self.model.get_submodule(module)
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
