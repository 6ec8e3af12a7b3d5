"""What one request runs with: the base model, one adapter, or a blend, resolved to digests.

As a client writes it (`SelectionSpec`) it names adapters; as the engine runs it (`Selection`) it holds digests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from adapters.errors import InvalidSelection

BASE = "base"
MAX_BLEND = 32
MAX_WEIGHT = 1e4  # a weight beyond it is a slip, and can overflow a batch's arithmetic


class Mode(StrEnum):
    """How a selection is computed: beside the base weights (the reference), or folded into them where possible."""

    SWITCH = "switch"
    MERGE = "merge"


@dataclass(frozen=True, slots=True)
class SelectedAdapter:
    """One adapter of a selection. `digest` identifies the version; `name`, and whose it is, are for people."""

    name: str
    digest: str
    weight: float = 1.0
    owner: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Selection:
    """A resolved selection. No adapters: the base model. Several, or a weight other than 1: a blend."""

    adapters: tuple[SelectedAdapter, ...] = ()
    mode: Mode = Mode.SWITCH

    @property
    def is_base(self) -> bool:
        return not self.adapters

    @property
    def is_blend(self) -> bool:
        return len(self.adapters) > 1 or any(adapter.weight != 1.0 for adapter in self.adapters)

    @property
    def key(self) -> tuple[tuple[str, float], ...]:
        """What decides the output, for caches and for telling whether two rows run the same thing."""
        return tuple((adapter.digest, adapter.weight) for adapter in self.adapters)

    @property
    def names(self) -> str:
        """As clients write it: `base`, a name, or `name:weight+…` for a blend."""
        if self.is_base:
            return BASE
        if not self.is_blend:
            return self.adapters[0].name
        return "+".join(f"{adapter.name}:{adapter.weight:g}" for adapter in self.adapters)

    @property
    def header(self) -> str:
        """The `X-Adapter-Digest` response header: `base`, a digest, or `digest:weight,…` for a blend."""
        if self.is_base:
            return BASE
        if not self.is_blend:
            return self.adapters[0].digest
        return ",".join(f"{adapter.digest}:{adapter.weight:g}" for adapter in self.adapters)


@dataclass(frozen=True, slots=True)
class WeightedName:
    """An adapter as a client names it: `name`, or `name@sha256:<prefix>` to pin a version, and its weight."""

    name: str
    weight: float = 1.0

    def split(self) -> tuple[str, str | None]:
        """(name, digest prefix or None)."""
        name, at, prefix = self.name.partition("@")
        if at and not prefix:
            raise InvalidSelection(f"{self.name!r} ends in '@'; a version is pinned as name@sha256:<hex digits>")
        return name, prefix or None


@dataclass(frozen=True, slots=True)
class SelectionSpec:
    """A selection as a client asks for it. `names` None: nothing was asked; empty: the base model."""

    names: tuple[WeightedName, ...] | None = None
    mode: Mode | None = None

    @classmethod
    def of(cls, adapter: str | None, adapters: Sequence[WeightedName] | None, mode: str | None = None) -> SelectionSpec:
        """From the request's `adapter`, `adapters` and `mode` fields. Raises InvalidSelection."""
        if adapter is not None and adapters is not None:
            raise InvalidSelection("give either 'adapter' or 'adapters', not both", subject="adapters")
        chosen = None if mode is None else _mode(mode)
        if adapter is not None:
            return cls(() if adapter == BASE else (WeightedName(adapter),), chosen)
        if adapters is None:
            return cls(None, chosen)
        _check_blend(adapters)
        return cls(tuple(adapters), chosen)


def _mode(mode: str) -> Mode:
    try:
        return Mode(mode)
    except ValueError:
        raise InvalidSelection(f"mode is {mode!r}; it must be 'switch' or 'merge'", subject="mode") from None


def _check_blend(adapters: Sequence[WeightedName]) -> None:
    if not 1 <= len(adapters) <= MAX_BLEND:
        raise InvalidSelection(f"a blend takes 1 to {MAX_BLEND} adapters, not {len(adapters)}", subject="adapters")
    for adapter in adapters:
        if adapter.name == BASE:
            raise InvalidSelection(
                '\'base\' has no delta to blend; leave it out, or use "adapter": "base"', subject="adapters"
            )
        if not abs(adapter.weight) <= MAX_WEIGHT:
            raise InvalidSelection(
                f"the weight of {adapter.name!r} is {adapter.weight:g}; it must be between {-MAX_WEIGHT:g} and "
                f"{MAX_WEIGHT:g}",
                subject="adapters",
            )
