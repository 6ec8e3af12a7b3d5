"""Trained biases and saved modules, per row: parameters of the base that an adapter brings its own values for.

A row that runs one adapter gets its values; a blend gets `W0 + Σ w_j (W_j − W0)`. Rows that use the same values of a
module run it together, with those values in place of the base's. A classifier's heads may differ in their number of
labels: there W0 is the base's where it has as many, else 0, and rows that have fewer than others are filled with NaN.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from adapters.errors import InvalidSelection

Parameters = Mapping[str, Tensor]  # a module's parameters by attribute ("weight", "bias")


# T5 looks these up by the distances between tokens, once for all rows of a batch.
SHARED_BY_ROWS = "relative_attention_bias"


def is_replaceable(module: nn.Module) -> bool:
    """Whether a module's parameters can differ from row to row: a leaf that maps every token on its own."""
    if not any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.children()):
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
        return False  # what else it takes may be per row too
    name = type(module).__name__
    return isinstance(module, (nn.Linear, nn.Embedding)) or name == "Conv1D" or "Norm" in name


class RowReplacements:
    """Which rows of a batch run one module with other parameters than the base's.

    `groups` are (rows, parameters): rows None stands for every row.
    """

    def __init__(self, rows: int, groups: Sequence[tuple[Sequence[int] | None, Parameters]]) -> None:
        self._rows = rows
        self._groups = groups

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """`module(x)` for x [rows, …] or [rows · tokens, …], each row with its own parameters."""
        if len(self._groups) == 1 and self._groups[0][0] is None:
            whole: Tensor = functional_call(module, dict(self._groups[0][1]), (x,))
            return whole
        by_row = self._by_row(x)
        output: Tensor = module(by_row)
        for rows, parameters in self._groups:
            index = torch.tensor(rows, device=x.device)
            part: Tensor = functional_call(module, dict(parameters), (by_row[index],))
            output = _widened(output, part.shape[-1])
            output[index] = _widened(part, output.shape[-1])
        return output.flatten(0, 1) if by_row.dim() > x.dim() else output

    def _by_row(self, x: Tensor) -> Tensor:
        if x.shape[0] == self._rows:
            return x
        if x.shape[0] == 1:
            return x.expand(self._rows, *x.shape[1:])  # positions, given once for all rows
        assert x.shape[0] % self._rows == 0, f"a module received {tuple(x.shape)} for a batch of {self._rows} rows"
        return x.reshape(self._rows, x.shape[0] // self._rows, *x.shape[1:])


def _widened(output: Tensor, width: int) -> Tensor:
    """At least so wide. What is filled in is no row's own: NaN shows whoever reads it."""
    missing = width - output.shape[-1]
    return output if missing <= 0 else F.pad(output, (0, missing), value=torch.nan)


def origin(own: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """What a blend of these starts from: the base's own, or zeros for heads with labels of another number.

    Raises InvalidSelection if they differ among themselves.
    """
    shapes = {part.shape for part in parts}
    if len(shapes) > 1:
        raise InvalidSelection(
            "the adapters' classification heads have different numbers of labels: they cannot be blended",
            subject="adapters",
        )
    return own if not shapes or own.shape in shapes else torch.zeros_like(parts[0])


def blended(own: Tensor, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """`own + Σ weight · (part − own)` in float32, rounded to own's dtype. A single part of weight 1 is exact."""
    if not parts:
        return own
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    wide = own.float()
    return (wide + sum(weight * (part.float() - wide) for part, weight in parts)).to(own.dtype)
