"""The selection that is folded into the base weights, while the batch asks for it: when to fold, and what it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from adapters.factors import AdapterFactors
from adapters.merge import FoldReport, Merger
from service.engine.auto_merge import AutoMerge
from service.engine.fatal import is_fatal
from service.engine.scheduler import foldable
from service.engine.selection import Selection
from service.engine.sequence import Sequence

log = logging.getLogger(__name__)


class Folding:
    """What is folded into one base model, `selection`; None while its weights are pristine."""

    def __init__(self, merger: Merger, auto_merge: AutoMerge | None = None) -> None:
        self._merger = merger
        self._auto_merge = auto_merge
        self._unfoldable: set[object] = set()
        self.selection: Selection | None = None
        self.folds = self.restores = 0
        self.fold_s = self.restore_s = 0.0

    @property
    def is_folded(self) -> bool:
        return self.selection is not None

    def fold(self, selection: Selection, factors: Seq[AdapterFactors]) -> FoldReport:
        """Folds a selection into the base weights now, and says what that lost.

        The next step restores them if its rows want something else.
        """
        self._fold(selection, factors)
        return self._merger.rounding(_weighted(selection, factors))

    def follow(self, running: Seq[Sequence], factors_of: Callable[[Sequence], Seq[AdapterFactors]]) -> None:
        """Folded only while every row of the batch has the one selection that asked for it, or that it pays for."""
        if not running:
            return
        wanted = foldable(running)
        if wanted is None and self._auto_merge is not None:
            sole = foldable(running, automatic=True)
            wanted = sole if sole is not None and self._auto_merge.wants(sole.key) else None
        if self.selection is not None and (wanted is None or wanted.key != self.selection.key):
            self._restore()
        if self.selection is None and wanted is not None and wanted.key not in self._unfoldable:
            self._try_fold(wanted, factors_of(running[0]))

    def observe_step(self, running: Seq[Sequence], seconds: float) -> None:
        """One decode step of these rows, for the policy that folds unasked."""
        if self._auto_merge is not None:
            sole = foldable(running, automatic=True)
            self._auto_merge.observe(sole.key if sole else None, seconds, folded=self.is_folded)

    def forget_failures(self) -> None:
        """What could not be folded may be tried again."""
        self._unfoldable.clear()

    def _fold(self, selection: Selection, factors: Seq[AdapterFactors]) -> None:
        if self.selection is not None:
            self._restore()
        began = time.perf_counter()
        self._merger.fold(_weighted(selection, factors))
        self.selection = selection
        seconds = time.perf_counter() - began
        self.folds += 1
        self.fold_s += seconds
        if self._auto_merge is not None:
            self._auto_merge.folded_in(seconds)

    def _restore(self) -> None:
        began = time.perf_counter()
        self._merger.restore()
        self.selection = None
        self.restores += 1
        self.restore_s += time.perf_counter() - began

    def _try_fold(self, selection: Selection, factors: Seq[AdapterFactors]) -> None:
        """Merging is a preference: what cannot be folded runs beside the weights, and is not tried again."""
        try:
            self._fold(selection, factors)
        except Exception as error:
            if is_fatal(error):
                raise
            log.warning("%s cannot be folded: %s", selection.header, error)
            self._unfoldable.add(selection.key)


def _weighted(selection: Selection, factors: Seq[AdapterFactors]) -> list[tuple[AdapterFactors, float]]:
    return [(each, adapter.weight) for each, adapter in zip(factors, selection.adapters, strict=True)]
