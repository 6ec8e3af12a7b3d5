"""Regular expressions from strangers' configs, compiled and matched within bounds of time and memory.

PEFT's patterns may use lookaheads, so they need a backtracking matcher; `regex` has one with a timeout. What the
timeout does not bound is refused before it is compiled: large counted repeats, which `regex` expands
(`((a{1000}){1000}){1000}` would take all memory there is), recursion and fuzzy matching, whose stacks grow as fast as
they run, and the verbose mode, in which none of these can be seen. No pattern for module names needs them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import regex

from adapters.errors import BadConfig

# A hostile pattern may backtrack for ever, or a little on each of thousands of names; an honest one compiles in a
# millisecond and matches a name in microseconds. So all patterns of one matcher share this much processor time.
TIMEOUT_S = 0.5
LONGEST_PATTERN = 10_000
MOST_EXPANDED = 100_000  # characters of a pattern, each as often as the counted repeats could repeat it

_COUNT = re.compile(r"\{([0-9]+)")
_NO_COUNT = re.compile(r"\{(?![0-9]+\}|[0-9]*,[0-9]*\})")  # a brace that begins anything else: {e<=2}, \p{L}
_RECURSION = re.compile(r"\(\?(?:R|[+-]?[0-9]|&|P[>&])")
_VERBOSE = re.compile(r"\(\?[a-zA-Z0-9-]*x")


class Allowance:
    """Processor time that is spent bit by bit."""

    def __init__(self, seconds: float = TIMEOUT_S) -> None:
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
    """One regular expression of the config's field `field_name`. Making it and matching with it raise BadConfig."""

    def __init__(self, pattern: str, field_name: str, allowance: Allowance) -> None:
        self._field = field_name
        self._allowance = allowance
        self._refuse_costly(pattern)
        try:
            with allowance.spending():
                self._compiled = regex.compile(pattern)
        except TimeoutError as error:
            raise self._too_slow() from error
        except (regex.error, ValueError, RecursionError, OverflowError) as error:
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
            raise self._too_slow() from error

    def _refuse_costly(self, pattern: str) -> None:
        if len(pattern) > LONGEST_PATTERN:
            raise self._refusal(f"a regular expression of {len(pattern):,} characters is too long")
        if _expanded_length(pattern) > MOST_EXPANDED:
            raise self._refusal("the regular expression repeats its parts too often")
        if _NO_COUNT.search(pattern):
            raise self._refusal("the regular expression has a brace that begins no count of repeats")
        if _RECURSION.search(pattern):
            raise self._refusal("the regular expression calls itself, which PEFT's cannot")
        if _VERBOSE.search(pattern):
            raise self._refusal("the regular expression uses the verbose mode (?x)")

    def _too_slow(self) -> BadConfig:
        return self._refusal("the regular expression takes too long to match")

    def _refusal(self, what: str) -> BadConfig:
        return BadConfig(f"{self._field}: {what}; list the module names instead", subject=self._field)


def _expanded_length(pattern: str) -> int:
    """A bound on what compiling makes of a pattern, as if every counted repeat in it held all the others."""
    length = len(pattern)
    for digits in _COUNT.findall(pattern):
        length *= max(1, int(digits[:10]))  # ten digits are too many already
        if length > MOST_EXPANDED:
            break
    return length
