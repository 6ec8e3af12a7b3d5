"""Folds a selection into the base weights, and restores the pristine weights bit for bit.

Restoring copies the pristine weights back; it never subtracts. (PEFT subtracts: after 20 merges and unmerges in
bfloat16, 42% of the base weights had changed.) Folding rounds `W + Δ` to the model's dtype, which is exact only in
float32: `fold` reports the rounding it caused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.compose import delta
from adapters.layers import AdaptedModel, AdapterFactors
from adapters.targets import is_conv1d


@dataclass(frozen=True, slots=True)
class FoldReport:
    """`merge_error`: ‖fold(W) − W − Δ‖ / ‖Δ‖ of the worst layer, called `layer`; 0 where nothing was folded."""

    merge_error: float
    layer: str | None


class Merger:
    """Keeps one base model either pristine or folded with one selection.

    Pristine weights of the layers that a fold touches are copied to host memory, when they are first touched.
    A tied weight is given storage of its own for as long as it is folded: an adapter on `lm_head` must not change the
    input embeddings.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self._model = model
        self._pristine: dict[str, Tensor] = {}
        self._folded: dict[str, Tensor] = {}  # the layer's own storage, aside while another is folded in
        uses = Counter(id(p) for module in model.model.modules() for p in module.parameters(recurse=False))
        self._tied = frozenset(parameter for parameter, count in uses.items() if count > 1)

    @property
    def is_folded(self) -> bool:
        return bool(self._folded)

    def fold(self, selection: Sequence[tuple[AdapterFactors, float]]) -> FoldReport:
        """Replaces the weights of every layer that `selection` adapts by `W + Σ weight · delta`.

        Whatever was folded before is restored first. Returns the rounding error of the fold.
        """
        self.restore()
        worst, worst_layer = 0.0, None
        for name, change in _deltas(self._model, selection).items():
            error = self._fold_layer(name, change)
            if error >= worst:
                worst, worst_layer = error, name
        return FoldReport(worst, worst_layer)

    def restore(self) -> None:
        """Puts every folded layer's own weight back. Bit-exact; does nothing when nothing is folded."""
        for name, weight in self._folded.items():
            weight.data.copy_(self._pristine[name])
            _set_weight(self._model.base_layer(name), weight)
        self._folded.clear()

    def _fold_layer(self, name: str, change: Tensor) -> float:
        layer = self._model.base_layer(name)
        own: Tensor = layer.weight  # type: ignore[assignment]
        if name not in self._pristine:
            self._pristine[name] = own.detach().to("cpu", copy=True)
        wide = own.detach().float()
        folded = (wide + change).to(own.dtype)
        scale = float(change.norm())
        error = float((folded.float() - wide - change).norm()) / scale if scale else 0.0
        if id(own) in self._tied:
            _set_weight(layer, nn.Parameter(folded, requires_grad=False))
        else:
            own.data.copy_(folded)
        self._folded[name] = own
        return error


@torch.inference_mode()
def _deltas(model: AdaptedModel, selection: Sequence[tuple[AdapterFactors, float]]) -> Mapping[str, Tensor]:
    """Σ weight · delta of each layer that some adapter adapts, float32, in the layer's own orientation."""
    deltas: dict[str, Tensor] = {}
    for adapter, weight in selection:
        for name, factors in adapter.layers.items():
            transposed = is_conv1d(model.base_layer(name))
            term = weight * delta(factors.a, factors.b_t.T, transposed=transposed)
            deltas[name] = deltas[name] + term if name in deltas else term
    return deltas


def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    layer._parameters["weight"] = weight  # type: ignore[assignment]
