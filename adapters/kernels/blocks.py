"""How much of a table one program of a kernel takes: powers of two, chosen by the table's shape alone.

Never by the batch: how a sum is cut decides how it rounds, and a row's result must not depend on its neighbours.
The numbers are so small that nothing spills from Hopper's registers; no GPU has confirmed them yet.
"""

from __future__ import annotations

from dataclasses import dataclass

_FEATURES = 256  # of a tile, or of several, at once
_ACCUMULATED = 2048  # float32 sums that a program holds
_SPLITS = 8


@dataclass(frozen=True, slots=True)
class TileBlocks:
    """`ranks` × `tiles` × `features` of a tile at once; shrink's input is cut into `splits`."""

    ranks: int
    tiles: int
    features: int
    splits: int

    @classmethod
    def of(cls, *, rank: int, vector_length: int, in_tiles: int) -> TileBlocks:
        features = min(_power_of_two(vector_length), _FEATURES)
        tiles = min(_power_of_two(in_tiles), _FEATURES // features)
        ranks = min(_power_of_two(rank), _ACCUMULATED // (tiles * features))
        steps = -(-in_tiles // tiles) * -(-vector_length // features)
        return cls(ranks, tiles, features, min(steps, _SPLITS))


@dataclass(frozen=True, slots=True)
class FactorBlocks:
    """`ranks` × `features` of a factor at once; shrink's input is cut into `splits`."""

    ranks: int
    features: int
    splits: int

    @classmethod
    def of(cls, *, rank: int, in_features: int) -> FactorBlocks:
        features = min(_power_of_two(in_features), _FEATURES)
        ranks = min(_power_of_two(rank), _ACCUMULATED // features)
        return cls(ranks, features, min(-(-in_features // features), _SPLITS))


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
