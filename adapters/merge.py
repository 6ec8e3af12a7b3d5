"""Folds a selection into the base weights, and restores the pristine weights bit for bit.

Restoring copies the pristine weights back; it never subtracts. (PEFT subtracts: after 20 merges and unmerges in
bfloat16, 42% of the base weights had changed.) Folding rounds `W + Δ` to the model's dtype, which is exact only in
float32: `rounding` says what was lost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.compose import delta
from adapters.errors import InvalidSelection, MergeUnsupported
from adapters.factors import AdapterFactors
from adapters.layers import AdaptedModel
from adapters.packed import PackedLinear, own_value
from adapters.quantized import is_quantized
from adapters.replacements import blended
from adapters.targets import is_conv1d

Place = tuple[str, str]  # a module's name and the attribute of its parameter


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
        self._folded: dict[Place, Tensor] = {}  # the module's own parameter, aside while another is folded in
        uses = Counter(id(p) for module in model.model.modules() for p in module.parameters(recurse=False))
        self._tied = frozenset(parameter for parameter, count in uses.items() if count > 1)

    @property
    def is_folded(self) -> bool:
        return bool(self._folded)

    def fold(self, selection: Sequence[tuple[AdapterFactors, float]]) -> None:
        """Replaces every parameter that `selection` changes: weights by `W + Σ weight · delta`, and those it replaces.

        All but the last layer of a classification head, which may have another shape: see `AdapterFactors.head_alone`.
        Whatever was folded before is restored first. Raises, with the pristine parameters in place,
        MergeUnsupported when a layer is quantized, or the model held in parts, and InvalidSelection when a folded
        weight overflows its dtype.
        """
        self.restore()
        if self._model.cuts:
            raise MergeUnsupported("the base model is held in parts: nothing can be folded into it", subject="mode")
        try:
            for place in changed_places(selection):
                if not self._stays_beside(place):
                    self._fold_parameter(place, selection)
        except BaseException:
            self.restore()
            raise

    @torch.inference_mode()
    def rounding(self, selection: Sequence[tuple[AdapterFactors, float]]) -> FoldReport:
        """What rounding to the model's dtype has lost of this selection, which is folded at the moment."""
        worst, worst_layer = 0.0, None
        for name, attribute in changed_places(selection):
            layer = self._model.base_layer(name)
            low_rank = stacked(selection, name) if attribute == "weight" else None
            if low_rank is None:
                continue
            folded = own_value(layer, attribute)
            pristine = self._pristine[f"{name}.{attribute}"].to(folded.device)
            change = delta(*low_rank, transposed=is_conv1d(layer))
            base = blended(pristine.float(), replacing(selection, (name, attribute)))
            scale = float(change.norm())
            error = float((folded.float() - base - change).norm()) / scale if scale else 0.0
            if error >= worst:
                worst, worst_layer = error, name
        return FoldReport(worst, worst_layer)

    def restore(self) -> None:
        """Puts every folded parameter's own value back. Bit-exact; does nothing when nothing is folded."""
        for (name, attribute), parameter in self._folded.items():
            layer, pristine = self._model.base_layer(name), self._pristine[f"{name}.{attribute}"]
            if (packed := _packed(layer, attribute)) is not None:
                packed.pack(pristine)
                continue
            parameter.data.copy_(pristine)
            layer._parameters[attribute] = parameter  # type: ignore[assignment]
        self._folded.clear()
        self._model.moved.clear()

    def _stays_beside(self, place: Place) -> bool:
        """Whether rows keep running this with parameters of their own: a head with labels of its own has no place."""
        return self._model.head is not None and place[0] == self._model.head.output

    @torch.inference_mode()
    def _fold_parameter(self, place: Place, selection: Sequence[tuple[AdapterFactors, float]]) -> None:
        name, attribute = place
        layer = self._model.base_layer(name)
        own: Tensor | None = getattr(layer, attribute, None)
        if own is None or is_quantized(own):
            raise MergeUnsupported(
                f"{name!r} is quantized: an adapter runs beside it but cannot be folded into it; use mode 'switch'",
                subject="mode",
            )
        packed = _packed(layer, attribute)
        key = f"{name}.{attribute}"
        if key not in self._pristine:
            self._pristine[key] = packed.dense() if packed is not None else own.detach().to("cpu", copy=True)
        self._folded[place] = own
        if id(own) in self._tied:
            layer._parameters[attribute] = nn.Parameter(own.detach().clone(), requires_grad=False)
            self._model.moved.add(name)
        if packed is None:
            base, folded = own.detach(), getattr(layer, attribute).data
        else:
            base, folded = self._pristine[key], torch.empty_like(self._pristine[key])
        replaced = blended(base.float(), replacing(selection, place))
        low_rank = stacked(selection, name) if attribute == "weight" else None
        if low_rank is None:
            folded.copy_(replaced)
        else:
            _put_sum(folded, replaced, *low_rank, transposed=is_conv1d(layer))
        if not math.isfinite(float(torch.linalg.vector_norm(folded, torch.inf))):
            raise InvalidSelection(f"the selection overflows {own.dtype} when folded into {name!r}; use mode 'switch'")
        if packed is not None:
            packed.pack(folded)


def _packed(layer: nn.Module, attribute: str) -> PackedLinear | None:
    """The layer, if this parameter of it is a packed weight."""
    return layer if attribute == "weight" and isinstance(layer, PackedLinear) else None


def _put_sum(weight: Tensor, base: Tensor, a: Tensor, b: Tensor, *, transposed: bool) -> None:
    """Makes a weight, in place and in its own orientation, `base + B @ A`, rounded once. `base` is in float32."""
    if weight.dtype is torch.float32:
        weight.copy_(base).addmm_(*((a.T, b.T) if transposed else (b, a)))
    else:
        weight.copy_(base + delta(a, b, transposed=transposed))


def changed_places(selection: Sequence[tuple[AdapterFactors, float]]) -> list[Place]:
    """Every parameter that some adapter adapts or replaces, each once."""
    places: dict[Place, None] = {}
    for adapter, _ in selection:
        places.update({(name, "weight"): None for name in adapter.layers})
        places.update({(name, a): None for name, parameters in adapter.replaced.items() for a in parameters})
    return list(places)


def replacing(selection: Sequence[tuple[AdapterFactors, float]], place: Place) -> list[tuple[Tensor, float]]:
    """What the adapters bring in a parameter's stead, with their weights."""
    name, attribute = place
    parts = [(adapter.replaced.get(name, {}).get(attribute), weight) for adapter, weight in selection]
    return [(part, weight) for part, weight in parts if part is not None]


def stacked(selection: Sequence[tuple[AdapterFactors, float]], layer: str) -> tuple[Tensor, Tensor] | None:
    """A [R, in] and B [out, R] of one layer, stacked over its adapters, weights in B; None if no adapter adapts it.

    One layer at a time: the deltas of a whole model in float32 would take up to twice a 16-bit model's memory.
    """
    present = [(adapter.layers[layer], weight) for adapter, weight in selection if layer in adapter.layers]
    if not present:
        return None
    a = torch.cat([factors.a for factors, _ in present])
    return a, torch.cat([weight * factors.b_t for factors, weight in present]).T
