"""A batch whose low-rank part kernels compute from tables: which adapters its rows run with is data on the device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from adapters.kernels.delta import GroupDelta
from adapters.kernels.model_tables import LayerGroup
from adapters.replacements import RowReplacements


class TableBatch:
    """Implements `adapters.layers.Batch`, for any number of rows of one token each, from the RowTable's first.

    The first of a group's layers to run shrinks the input for all of them; each adds its own part to its own output,
    where it is: no output is copied, and q, k and v take four launches.
    """

    def __init__(self, groups: Sequence[LayerGroup], deltas: Sequence[GroupDelta]) -> None:
        self._places = {
            name: (delta, projection)
            for group, delta in zip(groups, deltas, strict=True)
            for projection, name in enumerate(group.names)
        }
        self.forget_input()

    def forget_input(self) -> None:
        self._shrunk: tuple[GroupDelta, Tensor] | None = None

    def replacements(self, name: str, module: nn.Module) -> RowReplacements | None:
        return None

    def add_delta(self, name: str, output: Tensor, x: Tensor) -> Tensor:
        if name not in self._places:
            return output
        delta, projection = self._places[name]
        if self._shrunk is None or self._shrunk[0] is not delta or self._shrunk[1] is not x:
            delta.shrink(x.reshape(-1, x.shape[-1]))
            self._shrunk = delta, x
        flat = output.reshape(-1, output.shape[-1])
        delta.add_projection(flat, projection)
        return flat.view(output.shape)
