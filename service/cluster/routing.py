"""What the routers of this process did, for its metrics."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum


class Routed(StrEnum):
    """HOME: to the replica that the adapters chose. SPILLED: to another, that one being full. ANY: to whichever, for
    want of adapters. REFUSED: all were full.
    """

    HOME = "home"
    SPILLED = "spilled"
    ANY = "any"
    REFUSED = "refused"


COUNTS: Counter[Routed] = Counter()
