"""When to fold a selection that nobody asked to fold: when all work has been its alone for long enough to pay.

A fold and its later restore cost what they were last measured to; a folded step saves what steps were measured to
differ by. No torch, no clock: times are passed in.
"""

from __future__ import annotations

from collections.abc import Hashable

_FIRST_TRY = 32  # steps of one selection before the first fold, whose cost is not known yet
_SMOOTHING = 0.1
_MARGIN = 2.0  # times the break-even: what was alone so long will, on average, be so for as long again
_GIVE_UP = 4096  # steps until a selection that folding does not help is tried again


class AutoMerge:
    """The policy for one engine. `observe` every decode step; `wants` says whether to fold now."""

    def __init__(self) -> None:
        self._selection: Hashable = None
        self._steps = 0
        self._fold_s: float | None = None
        self._step_s: dict[bool, float] = {}  # smoothed, by folded or not, of the selection at hand

    def observe(self, selection: Hashable | None, seconds: float, *, folded: bool) -> None:
        """One decode step. `selection` is the one that every row ran with, None if they differed or ran the base."""
        if selection is None or selection != self._selection:
            self._selection, self._steps, self._step_s = selection, 0, {}
            return
        self._steps += 1
        known = self._step_s.get(folded, seconds)
        self._step_s[folded] = known + _SMOOTHING * (seconds - known)

    def folded_in(self, seconds: float) -> None:
        """What the last fold took."""
        self._fold_s = seconds

    def wants(self, selection: Hashable) -> bool:
        """Whether this selection, which every row runs with, should be folded in, or stay so."""
        return selection == self._selection and self._steps >= self._threshold()

    def _threshold(self) -> float:
        saved = self._step_s.get(False, 0.0) - self._step_s.get(True, 0.0)
        if self._fold_s is None or len(self._step_s) < 2:
            return _FIRST_TRY
        return max(_FIRST_TRY, _MARGIN * 2 * self._fold_s / saved) if saved > 0 else _GIVE_UP
