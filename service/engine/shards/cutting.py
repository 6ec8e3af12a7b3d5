"""Makes a model the part of itself that one process holds, and its layers' outputs whole where that is needed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapters.cuts import Cut, Cuts, Side
from adapters.layers import AdaptedModel
from service.engine.shards.plan import Plan


def cut_model(model: Any, cuts: Cuts) -> None:
    """Replaces every layer that is cut by its part, in place. What is left of the whole is let go of."""
    for name, cut in cuts.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _part(model.get_submodule(name), cut))


def _part(layer: nn.Linear, cut: Cut) -> nn.Linear:
    weight = cut.parameter("weight", layer.weight.detach())
    bias = None if layer.bias is None else cut.parameter("bias", layer.bias.detach())
    assert weight is not None
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    part.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        part.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return part.train(layer.training)


def join_outputs(adapted: AdaptedModel, plan: Plan) -> None:
    """From now on, layers that are cut along their input answer the sum over all processes; those gathered, all parts.

    After the low-rank part has been added: of the first kind it is a summand too, of the second a part.
    """
    for name, cut in plan.cuts.items():
        if cut.side is Side.INPUT:
            _after(adapted, [name], _sum)
    _after(adapted, plan.gathered, _gather)


def _after(adapted: AdaptedModel, names: Iterable[str], join: Any) -> None:
    for name in names:
        adapted.model.get_submodule(name).register_forward_hook(partial(_joined, join))


def _joined(join: Any, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    joined: Tensor = join(output.contiguous())
    return joined


def _sum(part: Tensor) -> Tensor:
    dist.all_reduce(part)
    return part


def _gather(part: Tensor) -> Tensor:
    """[…, features of a part] → […, all features]."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts, dim=-1)
