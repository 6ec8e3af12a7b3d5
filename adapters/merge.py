"""Folds a selection into the base weights, and restores the pristine weights bit for bit.

Restoring copies the pristine weights back; it never subtracts. (PEFT subtracts: after 20 merges and unmerges in
bfloat16, 42% of the base weights had changed.) Folding rounds `W + Δ` to the model's dtype, which is exact only in
float32: `fold` reports the rounding it caused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.compose import delta
from adapters.errors import InvalidSelection
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
        self._pristine = model.pristine
        self._folded: dict[str, Tensor] = {}  # the layer's own storage, aside while another is folded in
        uses = Counter(id(p) for module in model.model.modules() for p in module.parameters(recurse=False))
        self._tied = frozenset(parameter for parameter, count in uses.items() if count > 1)

    @property
    def is_folded(self) -> bool:
        return bool(self._folded)

    def fold(self, selection: Sequence[tuple[AdapterFactors, float]]) -> FoldReport:
        """Replaces the weights of every layer that `selection` adapts by `W + Σ weight · delta`.

        Whatever was folded before is restored first. Returns the rounding error of the fold. Raises InvalidSelection,
        with the pristine weights in place, when a layer is quantized or a folded weight overflows its dtype.
        """
        self.restore()
        worst, worst_layer = 0.0, None
        try:
            for name in dict.fromkeys(name for adapter, _ in selection for name in adapter.layers):
                error = self._fold_layer(name, _weighted_delta(self._model, selection, name))
                if error >= worst:
                    worst, worst_layer = error, name
        except BaseException:
            self.restore()
            raise
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
        if not own.is_floating_point():
            raise InvalidSelection(f"{name!r} is quantized: an adapter runs beside it but cannot be folded into it")
        if name not in self._pristine:
            self._pristine[name] = own.detach().to("cpu", copy=True)
        wide = own.detach().float()
        folded = (wide + change).to(own.dtype)
        if not bool(folded.isfinite().all()):
            raise InvalidSelection(f"the selection overflows {own.dtype} when folded into {name!r}; use mode 'switch'")
        scale = float(change.norm())
        error = float((folded.float() - wide - change).norm()) / scale if scale else 0.0
        self._folded[name] = own
        if id(own) in self._tied:
            _set_weight(layer, nn.Parameter(folded, requires_grad=False))
        else:
            own.data.copy_(folded)
        return error


@torch.inference_mode()
def _weighted_delta(model: AdaptedModel, selection: Sequence[tuple[AdapterFactors, float]], layer: str) -> Tensor:
    """Σ weight · delta in one layer that some adapter adapts, float32, in the layer's own orientation.

    One layer at a time: the deltas of a whole model in float32 would take up to twice a 16-bit model's memory.
    """
    present = [(adapter.layers[layer], weight) for adapter, weight in selection if layer in adapter.layers]
    a = torch.cat([factors.a for factors, _ in present])  # [R, in]
    b_t = torch.cat([weight * factors.b_t for factors, weight in present])  # [R, out]
    return delta(a, b_t.T, transposed=is_conv1d(model.base_layer(layer)))


def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    layer._parameters["weight"] = weight  # type: ignore[assignment]
