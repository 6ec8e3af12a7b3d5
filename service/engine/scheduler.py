"""What the next step runs. Pure policy: no torch, no clock, no threads.

    prefill the prompts of those that joined, a few tokens each step; then decode everyone else

Fairness is by selection: each has a virtual time, the tokens it has been served, and the next to join is of the one
served least. A flood for one adapter may not keep another's lone request waiting, so beside the batch a few rows are
held in reserve for selections that have no row yet.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from service.engine.selection import Mode, Selection
from service.engine.sequence import RowLength, Sequence, SequenceStatus

Lengths = Seq[RowLength]

_LEAST_CHUNK = 32  # tokens of a prompt that is cut: a forward for fewer costs as much


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_batch_size` rows, and beside them `reserve` for selections without one; `prefill_tokens` in one step.

    Of these at most `scored_tokens` are of prompts whose log-probabilities are asked for: each needs a whole row of
    token logits. With `whole_prompts` none is cut, and the first of a step may be longer than what it has room for.
    """

    max_batch_size: int = 16
    reserve: int = 0
    prefill_tokens: int = 512
    scored_tokens: int = sys.maxsize
    whole_prompts: bool = False

    @classmethod
    def solo(cls) -> Limits:
        """For models that must be run one row at a time, with whole prompts."""
        return cls(max_batch_size=1, prefill_tokens=sys.maxsize)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `tokens` of a sequence's prompt."""

    sequence: Sequence
    tokens: Seq[int]


class Scheduler:
    """Waiting and running sequences."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: dict[Hashable, deque[Sequence]] = {}  # by share, first come first
        self._running: list[Sequence] = []
        self._served: dict[Hashable, float] = {}  # virtual times of the shares that wait or run

    @property
    def max_batch_size(self) -> int:
        return self._limits.max_batch_size

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> list[Sequence]:
        """In the order of the runner's rows."""
        return list(self._running)

    @property
    def decoding(self) -> list[Sequence]:
        return [sequence for sequence in self._running if not sequence.is_prefilling]

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._running
        for queue in self._waiting.values():
            yield from queue

    def add(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            # A share that was idle starts level with the one served least: it has no claim on the past.
            self._served.setdefault(sequence.share, min(self._served.values(), default=0.0))
            _insert(self._waiting.setdefault(sequence.share, deque()), sequence)

    def admit(
        self, fits: Callable[[Lengths], bool], ready: Callable[[Sequence], bool] = lambda _: True
    ) -> list[Sequence]:
        """Moves waiting sequences into the batch, those of the share served least first; returns them.

        `fits` says whether rows of these final lengths fit the memory; `ready` may hold a sequence back for now. While
        a share's turn does not fit, no later one overtakes it, so that a long prompt cannot starve.
        """
        admitted: list[Sequence] = []
        while (sequence := self._next(ready)) is not None:
            lengths = [each.final_length for each in (*self._running, sequence)]
            if not fits(lengths) and self._running:
                break
            self._start(sequence)
            admitted.append(sequence)
        return admitted

    def prefill(self) -> list[Chunk]:
        """The prompt tokens to run in this step, within the budget, for the shares served least first."""
        room, scored_room = self._limits.prefill_tokens, self._limits.scored_tokens
        chunks: list[Chunk] = []
        for sequence in sorted((s for s in self._running if s.is_prefilling), key=lambda s: self._served[s.share]):
            rest = sequence.request.prompt_ids[sequence.prefilled :]
            least = (len(rest) if self._limits.whole_prompts else min(len(rest), _LEAST_CHUNK)) if chunks else 0
            if room < least:
                break
            if sequence.is_scored and scored_room < least:
                continue
            most = len(rest) if self._limits.whole_prompts else room
            tokens = rest[: min(most, scored_room) if sequence.is_scored else most]
            room -= len(tokens)
            scored_room -= len(tokens) if sequence.is_scored else 0
            chunks.append(Chunk(sequence, tokens))
        return chunks

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Counts tokens run for a sequence against its share."""
        self._served[sequence.share] += tokens

    def remove_finished(self) -> list[int] | None:
        """Forgets finished sequences. Returns the rows that stay, in their new order; None when all stay in place.

        The last rows move into the gaps, so that few rows are copied.
        """
        for share, queue in list(self._waiting.items()):
            self._waiting[share] = deque(s for s in queue if s.status is not SequenceStatus.FINISHED)
            if not self._waiting[share]:
                del self._waiting[share]
        alive = [row for row, s in enumerate(self._running) if s.status is not SequenceStatus.FINISHED]
        order = None
        if len(alive) < len(self._running):
            order = _compacted(alive)
            self._running = [self._running[row] for row in order]
        shares = {sequence.share for sequence in self._running} | self._waiting.keys()
        self._served = {share: served for share, served in self._served.items() if share in shares}
        return order

    def line_up(self) -> list[int] | None:
        """Puts the rows that decode before those whose prompts still run; their new order, None when all stay."""
        decoding = sum(not sequence.is_prefilling for sequence in self._running)
        late = [row for row in range(decoding, len(self._running)) if not self._running[row].is_prefilling]
        if not late:
            return None
        order = list(range(len(self._running)))
        for row in range(decoding):
            if self._running[row].is_prefilling:
                other = late.pop()
                order[row], order[other] = other, row
        self._running = [self._running[row] for row in order]
        return order

    def _next(self, ready: Callable[[Sequence], bool]) -> Sequence | None:
        """The first of the share served least, among those that are ready and that there is a row for."""
        room = self._limits.max_batch_size - len(self._running)
        present = {sequence.share for sequence in self._running}
        for share in sorted(self._waiting, key=lambda share: self._served[share]):
            sequence = self._waiting[share][0]
            if room + (0 if share in present else self._limits.reserve) > 0 and ready(sequence):
                return sequence
        return None

    def _start(self, sequence: Sequence) -> None:
        queue = self._waiting[sequence.share]
        queue.popleft()
        if not queue:
            del self._waiting[sequence.share]
        sequence.status = SequenceStatus.RUNNING
        self._running.append(sequence)
        # The whole prompt at once, so that the next admission in this step is already weighed against it.
        self.charge(sequence, len(sequence.request.prompt_ids))


def _insert(queue: deque[Sequence], sequence: Sequence) -> None:
    """In order of arrival: one whose adapters had to be loaded comes late, and may not lose its turn by it."""
    place = len(queue)
    while place and queue[place - 1].arrival > sequence.arrival:
        place -= 1
    queue.insert(place, sequence)


def _compacted(alive: list[int]) -> list[int]:
    """The rows that stay, each in its place if it can, the last ones filling the gaps."""
    places = range(len(alive))
    movers = [row for row in alive if row >= len(alive)]
    return [row if row in set(alive) else movers.pop() for row in places]


def foldable(sequences: Iterable[Sequence], *, automatic: bool = False) -> Selection | None:
    """The selection that all of these run with, if it asked to be merged; `automatic`: even if it did not."""
    selections = {(s.selection.key, s.selection.mode): s.selection for s in sequences}
    keys = {key for key, _ in selections}
    if len(keys) != 1 or (len(selections) != 1 and not automatic):
        return None
    selection = next(iter(selections.values()))
    return selection if (automatic or selection.mode is Mode.MERGE) and not selection.is_base else None
