"""The members of a blend, of whatever adapter types: the layers, the extras and the config fields of all together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from adapters.config import AdapterConfig
from adapters.errors import InvalidSelection, ShapeMismatch
from adapters.layout import MODULE_PREFIX, extra_owner
from adapters.replacements import blended
from adapters.safetensors_header import TensorSpec
from adapters.targets import LayerShape

BaseTensor = Callable[[str], Tensor | None]

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Layout(Protocol):
    @property
    def layers(self) -> tuple[LayerShape, ...]: ...

    @property
    def layer_names(self) -> frozenset[str]: ...


class Checkpoint(Protocol):
    """What a checkpoint of any type has."""

    @property
    def layout(self) -> Layout: ...

    @property
    def config(self) -> AdapterConfig: ...

    @property
    def extras(self) -> Mapping[str, Tensor]: ...


Members = Sequence[tuple[Checkpoint, float]]


def check_weights(members: Members) -> None:
    """Raises InvalidSelection for no members, and for a weight that is not finite."""
    if not members or not all(math.isfinite(weight) for _, weight in members):
        raise InvalidSelection("a blend takes at least one adapter, and weights that are numbers", subject="adapters")


def joint_layers(members: Members) -> tuple[LayerShape, ...]:
    """Every layer that a member adapts, in order of first appearance. Raises ShapeMismatch where two disagree."""
    layers: dict[str, LayerShape] = {}
    for checkpoint, _ in members:
        for layer in checkpoint.layout.layers:
            if layers.setdefault(layer.name, layer) != layer:
                known = layers[layer.name]
                raise ShapeMismatch(
                    f"{layer.name} is {known.in_features}→{known.out_features} in one adapter and "
                    f"{layer.in_features}→{layer.out_features} in another: they are of different base models",
                    subject=layer.name,
                )
    return tuple(layers.values())


def joint_extras(members: Members, layers: Sequence[LayerShape], base: BaseTensor | None) -> dict[str, Tensor]:
    """Trained biases and saved modules: weighted differences from the base's, under the keys that PEFT reads.

    Raises InvalidSelection for extras that cannot be blended, ShapeMismatch for those of another base model.
    """
    adapted = {layer.name for layer in layers}
    parts: dict[str, list[tuple[Tensor, float]]] = {}
    for checkpoint, weight in members:
        for key, tensor in checkpoint.extras.items():
            owner, attribute = extra_owner(key), key.rpartition(".")[2]
            if attribute == "weight" and owner in adapted and owner not in checkpoint.layout.layer_names:
                raise InvalidSelection(
                    f"{owner} is saved whole by one adapter and adapted by another: PEFT has no file for both; blend "
                    "them per request",
                    subject="adapters",
                )
            parts.setdefault(f"{owner}.{attribute}", []).append((tensor, weight))
    extras = {}
    for name, of_members in sorted(parts.items()):
        owner, _, attribute = name.rpartition(".")
        inner = ".base_layer" if owner in adapted else ""
        extras[f"{MODULE_PREFIX}{owner}{inner}.{attribute}"] = _blended_extra(name, of_members, base)
    return extras


def extra_specs(extras: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """Extras as a layout lists them."""
    return tuple(TensorSpec(key, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in extras.items())


def joint_fields(members: Members, layers: Sequence[LayerShape], config_type: type[AdapterConfig]) -> dict[str, Any]:
    """The fields of a config of this type that say which modules are adapted and saved.

    As the members have them where they agree and adapt the same layers, else every layer by its name. So too where
    null names PEFT's default for another type: for OPT, say, it is six modules for VB-LoRA and two for LoRA.
    """
    configs = [checkpoint.config for checkpoint, _ in members]
    which = {(c.target_modules, c.exclude_modules, c.layers_to_transform, c.layers_pattern) for c in configs}
    same_layers = len(which) == 1 and {len(c.layout.layers) for c, _ in members} == {len(layers)}
    default = any(c.target_modules is None and not isinstance(c, config_type) for c in configs)
    targets, exclude, numbers, pattern = tuple(layer.name for layer in layers), None, None, ()
    if same_layers and not default:
        targets, exclude, numbers, pattern = which.pop()  # type: ignore[assignment]
    return {
        "target_modules": targets,
        "exclude_modules": exclude,
        "layers_to_transform": numbers,
        "layers_pattern": pattern,
        "modules_to_save": tuple(dict.fromkeys(name for config in configs for name in config.modules_to_save)),
        "task_type": _common(config.task_type for config in configs),
        "base_model_name_or_path": _common(config.base_model_name_or_path for config in configs),
    }


def joint_bias(members: Members, config_type: type[AdapterConfig]) -> str:
    """The `bias` that covers every member's, as this adapter type calls it."""
    configs = [checkpoint.config for checkpoint, _ in members]
    if any(config.bias == "all" for config in configs):
        return "all"
    return config_type.BIAS_OF_TARGETS if any(config.bias != "none" for config in configs) else "none"


def _blended_extra(name: str, parts: Sequence[tuple[Tensor, float]], base: BaseTensor | None) -> Tensor:
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    own = None if base is None else base(name)
    if own is None:
        raise InvalidSelection(
            f"the adapters bring their own {name}, which is blended with the base model's: name the base model",
            subject="adapters",
        )
    own = own.detach().cpu().float()
    if any(part.shape != own.shape for part, _ in parts):
        raise ShapeMismatch(f"{name} has another shape in an adapter than in the base model", subject=name)
    extra = blended(own, parts).contiguous()
    if not bool(extra.isfinite().all()):
        raise InvalidSelection(f"the weights are too large for these adapters: {name} overflows", subject="adapters")
    return extra


def _common(values: Iterable[str | None]) -> str | None:
    """The one value that is given; None if none is, or several are."""
    given = {value for value in values if value is not None}
    return given.pop() if len(given) == 1 else None
