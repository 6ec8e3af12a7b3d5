"""Linear layers on a CPU whose weights are kept as oneDNN wants them, in blocks, instead of row by row.

For the few rows of a decode step a product with a packed weight takes about half as long as one with a plain weight.
Packing is a permutation: it costs no precision and is undone exactly. It costs no memory either, but weights that were
pages of a file, which several processes may share, become the process's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16)
_ROWS = 16  # of a typical batch; a hint to oneDNN, whose choice serves any number of rows

_ops: Any = torch.ops.mkldnn


class PackedLinear(nn.Linear):
    """An `nn.Linear` that holds its weight packed: `weight` is a shape without values, on the meta device.

    Given a weight that has values, as `functional_call` does, it computes with that one.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta", dtype=layer.weight.dtype)
        self.weight.requires_grad_(False)
        self.bias = layer.bias
        self.train(layer.training)
        self.pack(layer.weight.detach())

    def pack(self, weight: Tensor) -> None:
        """Computes with a weight [out_features, in_features] from now on. Raises RuntimeError where oneDNN cannot."""
        self.packed: Tensor = _ops._reorder_linear_weight(weight, _ROWS)

    def dense(self) -> Tensor:
        """A copy of the weight [out_features, in_features], bit for bit what was packed."""
        with torch.inference_mode():  # the only mode in which autograd lets go of it
            plain: Tensor = self.packed.to_dense()
        return plain

    def plain(self) -> nn.Linear:
        """The layer as it was before packing."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.weight.dtype)
        layer.weight = nn.Parameter(self.dense().clone(), requires_grad=False)  # the clone is no inference tensor
        layer.bias = self.bias
        return layer.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_meta:
            output: Tensor = _ops._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return output
        return F.linear(x, self.weight, self.bias)


def own_value(module: nn.Module, attribute: str) -> Tensor:
    """A module's parameter, with its values: of a packed weight a plain copy."""
    if attribute == "weight" and isinstance(module, PackedLinear):
        return module.dense()
    value: Tensor = getattr(module, attribute)
    return value


def pack_linear_layers(model: nn.Module) -> int:
    """Packs every linear layer of a model that can be, in place; how many were.

    What is not on a CPU, not float32 or bfloat16, or of a class of its own stays as it is; so does everything where
    PyTorch comes without oneDNN, or this CPU lacks what oneDNN needs for the dtype. A weight that embeddings share
    stays theirs, and is in memory once more.
    """
    count = _pack_layers(model)
    if count:
        _leave_files(model)
    return count


def _pack_layers(model: nn.Module) -> int:
    count = 0
    for name, module in list(model.named_modules()):
        if not name or type(module) is not nn.Linear or not _is_plain(module.weight):
            continue
        try:
            layer = PackedLinear(module)
        except (AttributeError, RuntimeError):  # no such operator; none for this dtype
            return count
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
        count += 1
    return count


def unpack_linear_layers(model: nn.Module) -> None:
    """Makes every packed layer of a model the plain one that it was, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.plain())


def _leave_files(model: nn.Module) -> None:
    """Copies what is left of mapped files: one tensor of a file keeps all of its pages, packed weights' too."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and type(tensor) in (nn.Parameter, Tensor):
            tensor.data = tensor.data.clone()


def _is_plain(weight: Tensor) -> bool:
    is_tensor = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.numel() > 0
    return is_tensor and weight.dtype in _DTYPES
