"""What the server has been doing, for its page: requests by adapter, and the latencies of the last minute.

The metrics tell more of it, to whoever collects them; this is what the server can say of itself at once.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from adapters.store import SHARED
from service.engine.selection import Selection

WINDOW_S = 60.0
MOST_LATENCIES = 1024
MOST_ADAPTERS = 65_536


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Percentiles, in seconds, of `count` latencies; None of none."""

    count: int
    p50: float | None
    p95: float | None


class LatencyWindow:
    """The latencies of the last minute, at most the newest MOST_LATENCIES. Any thread may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._seen: deque[tuple[float, float]] = deque(maxlen=MOST_LATENCIES)  # (when, seconds)

    def add(self, seconds: float) -> None:
        with self._lock:
            self._seen.append((self._clock(), seconds))

    def summary(self) -> LatencySummary:
        with self._lock:
            oldest = self._clock() - WINDOW_S
            while self._seen and self._seen[0][0] < oldest:
                self._seen.popleft()
            seconds = sorted(seconds for _, seconds in self._seen)
        if not seconds:
            return LatencySummary(0, None, None)
        return LatencySummary(len(seconds), _percentile(seconds, 50), _percentile(seconds, 95))


class RequestCounts:
    """Requests accepted since the start, by adapter and by whose they were. Any thread may use it.

    Beyond `most` adapters, the one whose last request is longest ago begins anew.
    """

    def __init__(self, most: int = MOST_ADAPTERS) -> None:
        self._most = most
        self._lock = Lock()
        self._counts: OrderedDict[tuple[str, str], Counter[str]] = OrderedDict()  # (owner, name) → tenant → requests

    def count(self, selection: Selection, tenant: str) -> None:
        """One request of that tenant, for each adapter that it runs with."""
        with self._lock:
            for adapter in selection.adapters:
                self._counts.setdefault((adapter.owner, adapter.name), Counter())[tenant] += 1
                self._counts.move_to_end((adapter.owner, adapter.name))
            while len(self._counts) > self._most:
                self._counts.popitem(last=False)

    def of(self, owner: str, name: str, reader: str) -> int:
        """The requests with `owner`'s adapter of that name: the reader's own, and for the shared tenant everyone's."""
        with self._lock:
            counts = self._counts.get((owner, name), Counter())
            return sum(counts.values()) if reader == SHARED else counts[reader]

    def forget(self, owner: str, name: str) -> None:
        """The adapter was deleted: another of its name begins at 0."""
        with self._lock:
            self._counts.pop((owner, name), None)


class Activity:
    """One server's, from its start on."""

    def __init__(self) -> None:
        self.requests = RequestCounts()
        self.first_token = LatencyWindow()
        self.inter_token = LatencyWindow()
        self.total = LatencyWindow()
        self._started = time.monotonic()

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started


def _percentile(ordered: list[float], percent: int) -> float:
    """The nearest rank: one of the values."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]
