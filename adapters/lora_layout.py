"""What a plain LoRA checkpoint file declares, checked against its config before a tensor is read.

Keys (PEFT): `base_model.model.<module>.lora_A.weight` [r, in] and `….lora_B.weight` [out, r]; besides them the extras
that VB-LoRA checkpoints have too, trained biases and saved modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapters.errors import MissingTensor, ShapeMismatch, UnsupportedCheckpoint
from adapters.layout import (
    MODULE_PREFIX,
    called_for,
    check_distinct,
    check_extra,
    expect_float,
    expect_shape,
    without_copies,
)
from adapters.lora_config import LoRAConfig
from adapters.parameters import LoRAParameterCount
from adapters.safetensors_header import WEIGHTS_FILE, TensorSpec
from adapters.targets import LayerShape, check_targets

_FACTOR_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Tensors that only a variant of LoRA has, and what it adapts.
_VARIANT_KEYS: Mapping[str, str] = {
    ".lora_embedding_": "an embedding",
    ".lora_magnitude_vector": "with DoRA",
    ".lora_B.bias": "with a bias of B",
    ".trainable_tokens_": "an embedding token by token",
}


@dataclass(frozen=True, slots=True)
class LoRALayout:
    """One checkpoint's config, its layers in file order with the rank and scaling of each, and its other tensors."""

    config: LoRAConfig
    layers: tuple[LayerShape, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    extras: tuple[TensorSpec, ...] = ()

    @classmethod
    def of(cls, config: LoRAConfig, layers: tuple[LayerShape, ...], extras: tuple[TensorSpec, ...] = ()) -> LoRALayout:
        """The layout with the ranks and scalings that the config gives these layers."""
        names = [layer.name for layer in layers]
        return cls(config, layers, tuple(config.ranks(names)), tuple(config.scalings(names)), extras)

    def parameters(self) -> LoRAParameterCount:
        own = sum(
            rank * (layer.in_features + layer.out_features) for layer, rank in zip(self.layers, self.ranks, strict=True)
        )
        # What training changed: not the embeddings that PEFT stores unasked.
        other = sum(spec.elements for spec in self.extras if called_for(self.config, spec, self.layer_names))
        return LoRAParameterCount(lora_params=own, other_params=other, r=self.config.r)

    @property
    def layer_names(self) -> frozenset[str]:
        return frozenset(layer.name for layer in self.layers)

    def scaled_layers(self) -> Iterator[tuple[LayerShape, float]]:
        return zip(self.layers, self.scalings, strict=True)


def factor_key(module: str, side: str) -> str:
    return f"{MODULE_PREFIX}{module}.lora_{side}.weight"


def lora_layout(config: LoRAConfig, specs: Mapping[str, TensorSpec]) -> LoRALayout:
    """The layout that a config and a file's tensors make together. Raises CheckpointError."""
    factors: dict[str, dict[str, TensorSpec]] = {}
    extras: list[TensorSpec] = []
    for key, spec in specs.items():
        if match := _FACTOR_KEY.fullmatch(key):
            factors.setdefault(match[1], {})[match[2]] = spec
        else:
            _refuse_variant(key)
            extras.append(spec)
    if not factors:
        raise MissingTensor("the file holds no LoRA factors for any module", subject=WEIGHTS_FILE)
    extras = without_copies(config, extras)
    shapes = [_shape(module, sides) for module, sides in factors.items()]
    layout = LoRALayout.of(config, tuple(shapes), tuple(extras))
    for layer, rank in zip(shapes, layout.ranks, strict=True):
        expect_shape(factors[layer.name]["A"], (rank, layer.in_features), "[r, in_features]")
        expect_shape(factors[layer.name]["B"], (layer.out_features, rank), "[out_features, r]")
    check_targets(config, [layer.name for layer in shapes])
    for extra in extras:
        check_extra(config, extra, factors.keys())
    check_distinct(extras)
    return layout


def _shape(module: str, sides: Mapping[str, TensorSpec]) -> LayerShape:
    for side in ("A", "B"):
        key = factor_key(module, side)
        if side not in sides:
            raise MissingTensor(f"the file has no {key}", subject=key)
        _check_matrix(sides[side])
    return LayerShape(module, sides["A"].shape[1], sides["B"].shape[0])


def _check_matrix(spec: TensorSpec) -> None:
    expect_float(spec)
    if len(spec.shape) > 2:
        raise UnsupportedCheckpoint(
            f"{spec.key} has shape {list(spec.shape)}, a convolution's; Linear and Conv1D layers can be served",
            subject=spec.key,
        )
    if len(spec.shape) < 2 or not spec.elements:
        raise ShapeMismatch(
            f"{spec.key} has shape {list(spec.shape)}; a matrix was expected. Were the shards gathered before saving?",
            subject=spec.key,
        )


def _refuse_variant(key: str) -> None:
    for part, what in _VARIANT_KEYS.items():
        if part in key:
            raise UnsupportedCheckpoint(
                f"the file holds {key!r}: it adapts {what}, which cannot be served; plain LoRA on linear layers can",
                subject=key,
            )
