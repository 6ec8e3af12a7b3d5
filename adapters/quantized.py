"""Quantized layers, known by their shape and by what they hold, whatever class a library made them of.

An adapter runs beside such a layer: that takes its features and its forward. Its weight is no matrix of numbers in the
model's dtype, so nothing can be folded into it and no row can bring another in its place.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight is stored in other numbers than it stands for: packed integers, 8-bit floats, a subclass."""
    return type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in _PLAIN


def holds_quantized(module: nn.Module) -> bool:
    """Whether a leaf's weight is quantized: a linear layer without any `weight` keeps it in parts of other names."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return is_quantized(weight)
    return isinstance(module, nn.Linear) or quantized_shape(module) is not None


def quantized_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a quantized linear layer that is no nn.Linear, None for every other module.

    It says its features, has no parts with parameters of their own, takes one input and holds no plain weight: what
    holds one and is no Linear may compute anything.
    """
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(each, int) for each in features) or any(True for _ in module.children()):
        return None
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and not is_quantized(weight):
        return None
    if not any(True for _ in module.parameters()) and not any(True for _ in module.buffers()):
        return None
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    return features if len(needed) == 1 else None  # type: ignore[return-value]
