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
from adapters.factors import AdapterFactors
from adapters.layers import AdaptedModel
from adapters.replacements import blended
from adapters.targets import is_conv1d

_Place = tuple[str, str]  # a module's name and the attribute of its parameter


@dataclass(frozen=True, slots=True)
class FoldReport:
    """`merge_error`: ‖fold(W) − W − Δ‖ / ‖Δ‖ of the worst layer, called `layer`; 0 where nothing was folded."""

    merge_error: float
    layer: str | None


class Merger:
    """Keeps one base model either pristine or folded with one selection.

    Pristine parameters that a fold touches are copied to host memory, when they are first touched. A tied weight is
    given storage of its own for as long as it is folded: an adapter on `lm_head` must not change the input embeddings.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self._model = model
        self._pristine = model.pristine
        self._folded: dict[_Place, Tensor] = {}  # the module's own parameter, aside while another is folded in
        uses = Counter(id(p) for module in model.model.modules() for p in module.parameters(recurse=False))
        self._tied = frozenset(parameter for parameter, count in uses.items() if count > 1)

    @property
    def is_folded(self) -> bool:
        return bool(self._folded)

    def fold(self, selection: Sequence[tuple[AdapterFactors, float]]) -> FoldReport:
        """Replaces every parameter that `selection` changes: weights by `W + Σ weight · delta`, and those it replaces.

        Whatever was folded before is restored first. Returns the rounding error of the fold. Raises InvalidSelection,
        with the pristine parameters in place, when a layer is quantized or a folded weight overflows its dtype.
        """
        self.restore()
        worst, worst_layer = 0.0, None
        try:
            for place in _changed_places(selection):
                error = self._fold_parameter(place, selection)
                if error is not None and error >= worst:
                    worst, worst_layer = error, place[0]
        except BaseException:
            self.restore()
            raise
        return FoldReport(worst, worst_layer)

    def restore(self) -> None:
        """Puts every folded parameter's own value back. Bit-exact; does nothing when nothing is folded."""
        for (name, attribute), parameter in self._folded.items():
            parameter.data.copy_(self._pristine[f"{name}.{attribute}"])
            self._model.base_layer(name)._parameters[attribute] = parameter  # type: ignore[assignment]
        self._folded.clear()

    @torch.inference_mode()
    def _fold_parameter(self, place: _Place, selection: Sequence[tuple[AdapterFactors, float]]) -> float | None:
        """Folds one parameter; the rounding error relative to its delta, None if it has none."""
        name, attribute = place
        layer = self._model.base_layer(name)
        own: Tensor = getattr(layer, attribute)
        if not own.is_floating_point():
            raise InvalidSelection(f"{name!r} is quantized: an adapter runs beside it but cannot be folded into it")
        if f"{name}.{attribute}" not in self._pristine:
            self._pristine[f"{name}.{attribute}"] = own.detach().to("cpu", copy=True)
        base = blended(own.detach(), _replacing(selection, place))
        change = _weighted_delta(layer, selection, name) if attribute == "weight" else None
        folded = base if change is None else (base.float() + change).to(own.dtype)
        if not bool(folded.isfinite().all()):
            raise InvalidSelection(f"the selection overflows {own.dtype} when folded into {name!r}; use mode 'switch'")
        error = None
        if change is not None and (scale := float(change.norm())):
            error = float((folded.float() - base.float() - change).norm()) / scale
        self._folded[place] = own
        if id(own) in self._tied:
            layer._parameters[attribute] = nn.Parameter(folded, requires_grad=False)
        else:
            own.data.copy_(folded)
        return error


def _changed_places(selection: Sequence[tuple[AdapterFactors, float]]) -> list[_Place]:
    """Every parameter that some adapter adapts or replaces, each once."""
    places: dict[_Place, None] = {}
    for adapter, _ in selection:
        places.update({(name, "weight"): None for name in adapter.layers})
        places.update({(name, a): None for name, parameters in adapter.replaced.items() for a in parameters})
    return list(places)


def _replacing(selection: Sequence[tuple[AdapterFactors, float]], place: _Place) -> list[tuple[Tensor, float]]:
    name, attribute = place
    parts = [(adapter.replaced.get(name, {}).get(attribute), weight) for adapter, weight in selection]
    return [(part, weight) for part, weight in parts if part is not None]


def _weighted_delta(module: nn.Module, selection: Sequence[tuple[AdapterFactors, float]], layer: str) -> Tensor | None:
    """Σ weight · delta of one layer, float32, in the layer's own orientation; None if no adapter adapts it.

    One layer at a time: the deltas of a whole model in float32 would take up to twice a 16-bit model's memory.
    """
    present = [(adapter.layers[layer], weight) for adapter, weight in selection if layer in adapter.layers]
    if not present:
        return None
    a = torch.cat([factors.a for factors, _ in present])  # [R, in]
    b_t = torch.cat([weight * factors.b_t for factors, weight in present])  # [R, out]
    return delta(a, b_t.T, transposed=is_conv1d(module))
