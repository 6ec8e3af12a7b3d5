"""What the routers of this process know and did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol
from weakref import WeakSet


class Routed(StrEnum):
    """HOME: to the replica that the adapters chose. SPILLED: to another, that one being full. ANY: to whichever, for
    want of adapters. REFUSED: all were full.
    """

    HOME = "home"
    SPILLED = "spilled"
    ANY = "any"
    REFUSED = "refused"


class Router(Protocol):
    @property
    def replica_names(self) -> Sequence[str]: ...

    def __hash__(self) -> int: ...


COUNTS: Counter[Routed] = Counter()
ROUTERS: WeakSet[Router] = WeakSet()
"""Each knows all replicas."""
