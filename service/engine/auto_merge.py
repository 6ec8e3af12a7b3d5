"""When to fold a selection that nobody asked to fold: when all work has been its alone for long enough to pay.

A fold and its later restore cost what they were last measured to; a folded step saves what steps were measured to
differ by. A fold that did not pay doubles the patience before the next. No torch, no clock: times are passed in.
"""

from __future__ import annotations

from collections.abc import Hashable

_FIRST_TRY = 32  # steps of one selection before the first fold, whose cost is not known yet
_TRIAL = 16  # folded steps before they are compared with the others
_SMOOTHING = 0.1
_MARGIN = 2.0  # times the break-even: what was alone so long will, on average, be so for as long again
_GIVE_UP = 4096  # steps until a selection that folding does not help is tried again


class AutoMerge:
    """The policy for one engine. `observe` every decode step; `wants` says whether to fold now, or to stay so."""

    def __init__(self) -> None:
        self._selection: Hashable = None
        self._steps = 0  # that were this selection's alone
        self._wait: float = _FIRST_TRY  # steps until it is folded
        self._patience = _FIRST_TRY
        self._step_s: dict[bool, float] = {}  # smoothed, by folded or not, of this selection
        self._folded_steps = 0
        self._fold_s: float | None = None  # what the last fold took
        self._saved_s: float | None = None  # what a folded step last saved, whatever the selection

    def observe(self, selection: Hashable | None, seconds: float, *, folded: bool) -> None:
        """One decode step. `selection` is the one that every row ran with, None if they differed or ran the base."""
        if selection is None or selection != self._selection:
            self._begin(selection)
            return
        self._steps += 1
        self._folded_steps += folded
        known = self._step_s.get(folded, seconds)
        self._step_s[folded] = known + _SMOOTHING * (seconds - known)
        if self._folded_steps >= _TRIAL and len(self._step_s) == 2:
            self._saved_s = self._step_s[False] - self._step_s[True]
            if self._saved_s <= 0:
                self._begin(selection)

    def folded_in(self, seconds: float) -> None:
        """What the last fold took."""
        self._fold_s = seconds

    def wants(self, selection: Hashable) -> bool:
        """Whether this selection, which every row runs with, should be folded in, or stay so."""
        return selection == self._selection and self._steps >= self._wait

    def _begin(self, selection: Hashable | None) -> None:
        if self._folded_steps:
            saved = self._folded_steps * (self._saved_s or 0.0)
            paid = self._fold_s is not None and saved >= 2 * self._fold_s
            self._patience = _FIRST_TRY if paid else min(2 * self._patience, _GIVE_UP)
        self._selection, self._steps, self._folded_steps, self._step_s = selection, 0, 0, {}
        self._wait = max(self._patience, self._break_even())

    def _break_even(self) -> float:
        if self._fold_s is None or self._saved_s is None:
            return 0.0
        return _MARGIN * 2 * self._fold_s / self._saved_s if self._saved_s > 0 else _GIVE_UP
