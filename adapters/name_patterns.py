"""A stranger's regular expressions on module names, matched in bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import regex

from adapters.errors import BadConfig

# A hostile pattern may backtrack for ever, or a little on each of thousands of names; an honest one matches a name in
# microseconds. So all patterns of one matcher share this much processor time.
REGEX_TIMEOUT_S = 0.5
LONGEST_REGEX = 10_000  # compiling takes time too


class Allowance:
    """Processor time that is spent bit by bit."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    @contextmanager
    def spending(self) -> Iterator[float]:
        """Charges what the block takes; gives the seconds that are left. Raises TimeoutError when none are."""
        if self._left <= 0:
            raise TimeoutError
        started = time.thread_time()
        try:
            yield self._left
        finally:
            self._left -= time.thread_time() - started


class Pattern:
    """A stranger's regular expression, matched in bounded time."""

    def __init__(self, pattern: str, field_name: str, allowance: Allowance) -> None:
        self._field = field_name
        self._allowance = allowance
        if len(pattern) > LONGEST_REGEX:
            raise BadConfig(
                f"{field_name}: a regular expression of {len(pattern):,} characters is too long; list the module names "
                "instead",
                subject=field_name,
            )
        try:
            self._compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise BadConfig(
                f"{field_name}: {pattern!r} is not a valid regular expression: {error}", subject=field_name
            ) from error

    def match(self, name: str) -> regex.Match[str] | None:
        """Matches the beginning of a name."""
        return self._timed(self._compiled.match, name)

    def fullmatch(self, name: str) -> regex.Match[str] | None:
        return self._timed(self._compiled.fullmatch, name)

    def _timed(self, match: Callable[..., regex.Match[str] | None], name: str) -> regex.Match[str] | None:
        try:
            with self._allowance.spending() as seconds:
                return match(name, timeout=seconds)
        except TimeoutError as error:
            raise BadConfig(
                f"{self._field}: the regular expression takes too long to match; list the module names instead",
                subject=self._field,
            ) from error
