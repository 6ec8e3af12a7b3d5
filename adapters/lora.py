"""Plain LoRA adapters in memory: read, stacked into weighted sums, and handed on as factors.

`delta = scaling · B @ A`, where the scaling is alpha / r (alpha / √r with rslora), by module. Weighted sums of LoRA
adapters, and of VB-LoRA adapters with them, are LoRA adapters again, exactly: their factors stacked along the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.checkpoint import TopKCheckpoint
from adapters.errors import InvalidSelection
from adapters.lora_config import LoRAConfig
from adapters.lora_layout import LoRALayout, factor_key
from adapters.members import (
    BaseTensor,
    check_weights,
    extra_specs,
    joint_bias,
    joint_extras,
    joint_fields,
    joint_layers,
)
from adapters.targets import LayerShape
from adapters.tensor_file import LARGEST_IN_FACTORS, ReadTensor, bounded, finite


@dataclass(frozen=True, slots=True, eq=False)
class LoRACheckpoint:
    """A plain LoRA adapter as it is stored.

    `matrices` maps a module name to A [r, in] and B [out, r], not scaled; `extras` are the trained biases and saved
    modules, by checkpoint key.
    """

    layout: LoRALayout
    matrices: Mapping[str, tuple[Tensor, Tensor]]
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> LoRAConfig:
        return self.layout.config

    @property
    def nbytes(self) -> int:
        """Bytes that the adapter holds in memory."""
        factors = sum(a.nbytes + b.nbytes for a, b in self.matrices.values())
        return factors + sum(tensor.nbytes for tensor in self.extras.values())

    def factors(self, device: torch.device | None = None) -> Iterator[tuple[LayerShape, Tensor, Tensor]]:
        """Each layer with A [r, in] and Bᵀ [r, out], float32, the scaling in Bᵀ."""
        for layer, scaling in self.layout.scaled_layers():
            a, b = self.matrices[layer.name]
            yield layer, a.to(device, torch.float32), b.to(device, torch.float32).T.mul(scaling).contiguous()

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's keys and shapes."""
        tensors = dict(self.extras)
        for module, (a, b) in self.matrices.items():
            tensors[factor_key(module, "A")] = a
            tensors[factor_key(module, "B")] = b
        return tensors


# What is kept in memory of an adapter of any type, and gives its factors.
ServedCheckpoint = TopKCheckpoint | LoRACheckpoint


def read_lora(layout: LoRALayout, read: ReadTensor) -> LoRACheckpoint:
    """The checkpoint that a layout describes, every tensor checked. Raises NonFinite."""
    matrices = {}
    for layer, scaling in layout.scaled_layers():
        keys = factor_key(layer.name, "A"), factor_key(layer.name, "B")
        a, b = (read(key).clone() for key in keys)  # what `read` returns may change with the file
        bounded(keys[0], a)
        bounded(keys[1], b.float() * scaling)
        matrices[layer.name] = a, b
    extras = {spec.key: finite(spec.key, read(spec.key).clone()) for spec in layout.extras}
    return LoRACheckpoint(layout, matrices, extras)


def stack_lora(members: Sequence[tuple[ServedCheckpoint, float]], base: BaseTensor | None = None) -> LoRACheckpoint:
    """`Σ weight · delta` of the members as one plain LoRA checkpoint in float32 that PEFT loads, with alpha = r.

    One VB-LoRA member of weight 1 makes its exact LoRA. Weights and scalings go into B. Every layer gets the rank of
    the one that needs most, filled up with zeros, so that tools without `rank_pattern` read it too. `base` gives the
    base model's parameters by name, as for `blend`.

    Raises InvalidSelection for no members, for a weight that is not finite or too large, and for extras that cannot be
    blended; ShapeMismatch when the members are of different base models.
    """
    check_weights(members)
    layers = joint_layers(members)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}
    for checkpoint, weight in members:
        for layer, a, b_t in checkpoint.factors():
            parts[layer.name].append((a, weight * b_t))
    r = max(sum(len(a) for a, _ in stack) for stack in parts.values())
    matrices = {name: _stacked(stack, r) for name, stack in parts.items()}
    if not all(float(b.abs().max()) <= LARGEST_IN_FACTORS for _, b in matrices.values()):  # NaN: infinity times 0
        raise InvalidSelection("the weights are too large for these adapters: their sum overflows", subject="adapters")
    extras = joint_extras(members, layers, base)
    config = LoRAConfig(
        r=r,
        lora_alpha=float(r),
        # On a base without biases there is nothing that it could mean, and other servers refuse it.
        bias=joint_bias(members, LoRAConfig) if any(key.endswith(".bias") for key in extras) else "none",
        extra=_carried([checkpoint.config.extra for checkpoint, _ in members]),
        **joint_fields(members, layers, LoRAConfig),
    )
    return LoRACheckpoint(LoRALayout.of(config, layers, extra_specs(extras)), matrices, extras)


def _stacked(parts: Sequence[tuple[Tensor, Tensor]], r: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of parts A [r_j, in] and Bᵀ [r_j, out], zeros where they need fewer ranks."""
    a, b_t = (torch.cat(sides) for sides in zip(*parts, strict=True))
    missing = r - len(a)
    return F.pad(a, (0, 0, 0, missing)), F.pad(b_t, (0, 0, 0, missing)).T.contiguous()


def _carried(extras: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What PEFT expects to be told besides: whether the base's layers keep their weights transposed (GPT-2's do)."""
    return {"fan_in_fan_out": any(extra.get("fan_in_fan_out") is True for extra in extras), "inference_mode": True}
