"""What the next step runs. Pure policy: no torch, no clock, no threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from service.engine.selection import Mode, Selection
from service.engine.sequence import Sequence, SequenceStatus


class Scheduler:
    """Waiting and running sequences. First come, first served, up to `max_batch_size` running at a time."""

    def __init__(self, max_batch_size: int) -> None:
        assert max_batch_size >= 1
        self._max_batch_size = max_batch_size
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        """In the order of the runner's rows."""
        return list(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._running
        yield from self._waiting

    def add(self, sequences: Iterable[Sequence]) -> None:
        self._waiting.extend(sequences)

    def admit(self) -> list[Sequence]:
        """Moves waiting sequences into the batch while there is room; returns those, whose prompts are to be run."""
        admitted = []
        while self._waiting and len(self._running) < self._max_batch_size:
            sequence = self._waiting.popleft()
            sequence.status = SequenceStatus.RUNNING
            self._running.append(sequence)
            admitted.append(sequence)
        return admitted

    def remove_finished(self) -> list[int] | None:
        """Forgets finished sequences. Returns the rows that stay in the batch, None when all do."""
        self._waiting = deque(s for s in self._waiting if s.status is not SequenceStatus.FINISHED)
        rows = [row for row, s in enumerate(self._running) if s.status is not SequenceStatus.FINISHED]
        if len(rows) == len(self._running):
            return None
        self._running = [self._running[row] for row in rows]
        return rows


def foldable(sequences: Iterable[Sequence]) -> Selection | None:
    """The selection that all of these run with, if it is one that asked to be merged; else None."""
    selections = {(s.selection.key, s.selection.mode): s.selection for s in sequences}
    if len(selections) != 1:
        return None
    selection = next(iter(selections.values()))
    return selection if selection.mode is Mode.MERGE and not selection.is_base else None
