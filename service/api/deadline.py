"""The time that something in several steps may take."""

from __future__ import annotations

from collections.abc import Callable


class Deadline:
    """The end of a whole fetch, however many requests it takes."""

    def __init__(self, timeout_s: float, clock: Callable[[], float]) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._end = clock() + timeout_s

    @property
    def passed(self) -> bool:
        return self._clock() >= self._end

    def remaining(self) -> float:
        """Seconds, above 0. Raises TimeoutError."""
        remaining = self._end - self._clock()
        if remaining <= 0:
            raise TimeoutError
        return remaining
