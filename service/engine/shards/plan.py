"""Which layers of a model are cut, and where: transformers' own plan for its architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adapters.cuts import Cut, Side
from service.engine.pooling.base import Unservable

# What the styles of a transformers plan mean for a linear layer. Embeddings and norms are whole everywhere.
_SIDES = {"colwise": Side.OUTPUT, "rowwise": Side.INPUT, "colwise_gather_output": Side.OUTPUT}
_GATHERED = "colwise_gather_output"
_WHOLE = {"replicated_with_grad_allreduce", "embedding_rowwise", "embedding_colwise"}


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `size` parts of a model, numbered from 0."""

    rank: int
    size: int

    def device(self, device: torch.device) -> torch.device:
        """Its own device of that kind."""
        return torch.device("cuda", self.rank) if device.type == "cuda" else device

    def part(self, whole: int) -> tuple[int, int]:
        """(start, stop) of this part of so many features, which `size` divides."""
        step = whole // self.size
        return self.rank * step, (self.rank + 1) * step


@dataclass(frozen=True, slots=True)
class Plan:
    """The cuts of one shard by layer, and the layers whose output every process needs whole."""

    cuts: Mapping[str, Cut]
    gathered: frozenset[str]


def plan_of(model: Any, shard: Shard) -> Plan:
    """What a shard holds of a transformers model, which may be on the meta device.

    Raises Unservable for a model without a plan, for a plan of which something is not known here, and for heads or
    features that the number of shards does not divide.
    """
    styles: Mapping[str, str] = getattr(model, "_tp_plan", None) or {}
    if not any(style in ("colwise", "rowwise") for style in styles.values()):
        raise Unservable(
            f"{model.config.model_type} models have no plan for tensor parallelism in transformers; leave out "
            "--tensor-parallel"
        )
    _check_heads(model.config.get_text_config(), shard.size)
    cuts, gathered = {}, set()
    for name, module in model.named_modules():
        style = styles.get(_generic(name))
        if style is None or style in _WHOLE:
            continue
        if style not in _SIDES or type(module) is not nn.Linear:
            raise Unservable(
                f"the plan of {model.config.model_type} models for tensor parallelism cuts {name}, a "
                f"{type(module).__name__}, {style}, which is not supported; leave out --tensor-parallel"
            )
        cut = _cut(name, module, style, shard)
        if cut is None:
            continue
        cuts[name] = cut
        if style == _GATHERED:
            gathered.add(name)
    return Plan(cuts, frozenset(gathered))


def _cut(name: str, layer: nn.Linear, style: str, shard: Shard) -> Cut | None:
    """None of one that stays whole: an output layer whose vocabulary cannot be divided."""
    side = _SIDES[style]
    whole = layer.out_features if side is Side.OUTPUT else layer.in_features
    if whole % shard.size:
        if style == _GATHERED:
            return None
        raise Unservable(
            f"tensor_parallel is {shard.size}, which does not divide the {whole} features of {name}; choose another"
        )
    return Cut(side, *shard.part(whole), whole)


def _check_heads(config: Any, size: int) -> None:
    for field, what in (("num_attention_heads", "attention heads"), ("num_key_value_heads", "key-value heads")):
        number = getattr(config, field, None)
        if number is not None and number % size:
            raise Unservable(f"tensor_parallel is {size}, which does not divide the model's {number} {what}")


def _generic(name: str) -> str:
    """A module's name as plans write it: layers by a star."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
