"""How often, and how often at once, a key may be used. For one thread: the event loop's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.api.errors import ApiError
from service.api.keys import ApiKey

_BUSY_RETRY_S = 1


@dataclass(slots=True)
class _Use:
    """A token bucket that holds a minute's worth, and what runs now."""

    tokens: float
    filled: float
    running: int = 0


class KeyLimits:
    """Keeps count by key. A key that is changed or read anew keeps its count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    @contextmanager
    def using(self, key: ApiKey) -> Iterator[None]:
        """While one request runs. Raises ApiError (`overloaded`, with Retry-After) beyond the key's limits."""
        if key.rate is None and key.concurrency is None:
            yield
            return
        use = self._refilled(key)
        if key.concurrency is not None and use.running >= key.concurrency:
            raise _overloaded(
                f"{use.running} requests with this API key are running, and it allows {key.concurrency}", _BUSY_RETRY_S
            )
        if key.rate is not None:
            if use.tokens < 1:
                wait = math.ceil((1 - use.tokens) * 60 / key.rate)
                raise _overloaded(f"this API key allows {key.rate} requests a minute", wait)
            use.tokens -= 1
        use.running += 1
        try:
            yield
        finally:
            use.running -= 1

    def _refilled(self, key: ApiKey) -> _Use:
        now, most = self._clock(), float(key.rate or 0)
        use = self._uses.setdefault(key.digest, _Use(most, now))
        use.tokens = min(most, use.tokens + (now - use.filled) * most / 60)
        use.filled = now
        return use


def _overloaded(why: str, retry_after_s: int) -> ApiError:
    headers = {"Retry-After": str(retry_after_s)}
    return ApiError("overloaded", f"{why}: try again in {retry_after_s} s", headers=headers)
