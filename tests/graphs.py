"""Graphs without a GPU: steps that are replayed by calling them again, and held to what a captured one may do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapters.kernels.delta import PairKernels
from service.engine.engine import BatchEngine
from service.engine.graphs.capture import Recorded, Step
from service.engine.graphs.decode import DecodeGraphs
from service.engine.graphs.setup import GraphOptions
from service.engine.model_runner import TransformersRunner

SMALL = 4 << 20  # bytes of tables: enough for tests, and quickly made

# A graph has no host to wait for, and no sizes that follow from values.
_REFUSED = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::lift_fresh",  # a tensor made of numbers of the host's
}


class HostNeeded(AssertionError):
    """A captured step asked the host."""


class _Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name in _REFUSED or (name in ("aten::index", "aten::index_put_") and _by_mask(args[1])):
            raise HostNeeded(name)
        return func(*args, **(kwargs or {}))


def _by_mask(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _refuse(*_: Any, **__: Any) -> Any:
    raise HostNeeded("tolist or numpy")


@contextmanager
def no_host() -> Iterator[None]:
    """Inside, nothing may read a tensor on the host, make one from numbers, or let values decide a shape."""
    with patch.object(Tensor, "tolist", _refuse), patch.object(Tensor, "numpy", _refuse), _Refusing():
        yield


class Guarded(Recorded):
    """Every run of a step, when it is captured and whenever it is replayed, without the host."""

    def capture(self, step: Step) -> Step:
        def guarded() -> None:
            with no_host():
                step()

        return super().capture(guarded)


def interpreted() -> Recorded:
    """With Triton's own kernels, which its interpreter runs: it looks into tensors, so it cannot be guarded."""
    kernels: PairKernels | None = None
    return Recorded(kernels=kernels)


def options(kernels: str, **others: Any) -> GraphOptions:
    return GraphOptions(**{"kernels": kernels, "memory": SMALL, **others})


def graphs_of(engine: BatchEngine) -> DecodeGraphs | None:
    runner = engine._worker._runner
    assert isinstance(runner, TransformersRunner)
    return runner.graphs


def places(engine: BatchEngine) -> Mapping[str, int]:
    """Where everything is that a captured step reads or writes, by name."""
    graphs = graphs_of(engine)
    assert graphs is not None
    tensors: dict[str, Tensor] = {f"buffer {i}": t for i, t in enumerate(graphs._buffers.tensors())}
    tensors |= {"slots": graphs._rows.slots, "weights": graphs._rows.weights}
    for layer, kv in enumerate(graphs._kv._layers):
        tensors |= {f"keys {layer}": kv.keys, f"values {layer}": kv.values}
    for group, table in enumerate(graphs.residency._tables.tables):  # type: ignore[attr-defined]
        for name in ("indices", "weights", "ranks", "places", "a", "b_t"):
            if hasattr(table, name):
                tensors[f"table {group} {name}"] = getattr(table, name)
    tensors |= dict(graphs._adapted.model.named_parameters())
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}
