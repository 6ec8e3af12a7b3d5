"""Decoders with a table of positions, told the position of each row.

They count the columns of their cache: a row that is padded on its left, as it joined later, would be given the position
of the longest. Decoders with relative positions are right without this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_BY_ID, _BY_LENGTH = "position_ids", "past_key_values_length"


class RowPositions:
    """Stands before every module of a decoder that looks positions up, while `at` says where each row is."""

    def __init__(self, decoder: nn.Module) -> None:
        self._positions: Tensor | None = None
        for module in decoder.modules():
            names = inspect.signature(module.forward).parameters
            if any(True for _ in module.children()) or _BY_LENGTH not in names:
                continue
            look_up = self._by_id if _BY_ID in names else self._by_length
            module.forward = self._instead(module.forward, look_up, names)

    @contextmanager
    def at(self, positions: Tensor) -> Iterator[None]:
        """For a forward over one token of each row; positions [rows]."""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def _instead(self, forward: Callable[..., Tensor], look_up: Any, names: Any) -> Callable[..., Tensor]:
        signature = inspect.Signature(list(names.values()))

        def run(*args: Any, **kwargs: Any) -> Tensor:
            if self._positions is None:
                return forward(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            found: Tensor = look_up(forward, given, self._positions)
            return found.reshape(len(self._positions), 1, -1)

        return run

    @staticmethod
    def _by_id(forward: Callable[..., Tensor], given: dict[str, Any], positions: Tensor) -> Tensor:
        return forward(**{**given, _BY_ID: positions})

    @staticmethod
    def _by_length(forward: Callable[..., Tensor], given: dict[str, Any], positions: Tensor) -> Tensor:
        """Row by row: such modules take one length for all."""
        return torch.cat(
            [forward(**_of_row(given, row), **{_BY_LENGTH: length}) for row, length in enumerate(positions.tolist())]
        )


def _of_row(given: dict[str, Any], row: int) -> dict[str, Any]:
    """One row's part of the arguments: of tensors, and of the shape that some take instead."""
    return {name: _part_of_row(name, value, row) for name, value in given.items() if name != _BY_LENGTH}


def _part_of_row(name: str, value: Any, row: int) -> Any:
    if isinstance(value, Tensor):
        return value[row : row + 1]
    return (1, *value[1:]) if name.endswith("shape") else value
