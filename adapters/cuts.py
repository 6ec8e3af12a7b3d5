"""A base model in parts: which part of each linear layer one device holds, and an adapter's factors of that part.

With `y = x Wᵀ + (x Aᵀ) Bᵀ`, a layer cut along its output features has rows of W and the same rows of B: `x` is whole
everywhere, so A is too. One cut along its input features has columns of W and the same columns of A: what it computes,
`x_part W_partᵀ + (x_part A_partᵀ) Bᵀ`, is a summand of y, so the sum over the devices that the base's own output needs
is the adapter's as well. Layers that are not cut are whole everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from adapters.checkpoint import TopKCheckpoint
from adapters.compose import mixtures
from adapters.lora import ServedCheckpoint
from adapters.targets import LayerShape


class Side(Enum):
    """Along which features a layer is cut: rows of its weight [out, in], or columns."""

    OUTPUT = auto()
    INPUT = auto()


@dataclass(frozen=True, slots=True)
class Cut:
    """The features `start` to `stop`, of `whole`, that are held here.

    Of a layer cut along its input the bias is added once: where `start` is 0.
    """

    side: Side
    start: int
    stop: int
    whole: int

    def __post_init__(self) -> None:
        assert 0 <= self.start < self.stop <= self.whole

    @property
    def held(self) -> slice:
        return slice(self.start, self.stop)

    def parameter(self, attribute: str, value: Tensor) -> Tensor | None:
        """The part held here of the layer's `weight` [out, in] or `bias` [out]; None of a bias added elsewhere."""
        if self.side is Side.OUTPUT:
            return value[self.held]
        if attribute == "bias":
            return value if self.start == 0 else None
        return value[:, self.held]

    def whole_shape(self, attribute: str, held: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole parameter of which this shape is held here."""
        if self.side is Side.OUTPUT:
            return self.whole, *held[1:]
        return held if attribute == "bias" else (held[0], self.whole)


Cuts = Mapping[str, Cut]  # by layer; those that are whole have none


def factors_of(
    checkpoint: ServedCheckpoint, cuts: Cuts, device: torch.device | None = None
) -> Iterator[tuple[LayerShape, Tensor, Tensor]]:
    """Each layer of an adapter with the parts held here of A [r, in] and Bᵀ [r, out], float32.

    Of a compact adapter only the tiles are composed that touch those parts.
    """
    if not cuts:
        yield from checkpoint.factors(device)
    elif isinstance(checkpoint, TopKCheckpoint):
        yield from _composed(checkpoint, cuts, device)
    else:
        for layer, a, b_t in checkpoint.factors(device):
            in_features, out_features = _features(layer, cuts)
            yield layer, a[:, in_features].contiguous(), b_t[:, out_features].contiguous()


def _composed(
    checkpoint: TopKCheckpoint, cuts: Cuts, device: torch.device | None
) -> Iterator[tuple[LayerShape, Tensor, Tensor]]:
    """All tiles in one composition; what a border cuts of its first and last tiles is left out afterwards."""
    r, length = checkpoint.config.r, checkpoint.config.vector_length
    everything = torch.arange(len(checkpoint.indices))
    positions = []
    for layer, rows_a, rows_b in checkpoint.layout.spans():
        in_features, out_features = _features(layer, cuts)
        of_a = everything[rows_a].view(r, -1)[:, _tiles(in_features, length)]
        of_b = everything[rows_b].view(-1, r)[_tiles(out_features, length)].T
        positions += [of_a.flatten(), of_b.flatten()]
    order = torch.cat(positions)
    indices, weights = checkpoint.indices[order].to(device), checkpoint.full_weights()[order].to(device)
    tiles = mixtures(indices, weights, checkpoint.bank.vectors.to(device))
    pieces = iter(torch.split(tiles, [len(each) for each in positions]))
    for layer in checkpoint.layout.layers:
        a, b_t = (_within(next(pieces).reshape(r, -1), features, length) for features in _features(layer, cuts))
        yield layer, a, b_t


def _features(layer: LayerShape, cuts: Cuts) -> tuple[slice, slice]:
    """The input and the output features of a layer that are held here."""
    cut = cuts.get(layer.name)
    ins, outs = slice(0, layer.in_features), slice(0, layer.out_features)
    if cut is None:
        return ins, outs
    return (ins, cut.held) if cut.side is Side.OUTPUT else (cut.held, outs)


def _tiles(features: slice, length: int) -> slice:
    """The tiles that these features touch."""
    return slice(features.start // length, -(-features.stop // length))


def _within(factor: Tensor, features: slice, length: int) -> Tensor:
    """These features of a factor [r, tiles · length] of the tiles they touch."""
    first = features.start // length * length
    return factor[:, features.start - first : features.stop - first].contiguous()
