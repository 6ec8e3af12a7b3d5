"""The leader's runner: what the engine asks of it, the followers are told to do as well."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from itertools import count

from torch import Tensor

from adapters.factors import AdapterFactors
from adapters.low_rank import LowRankBatch
from service.engine.fatal import ShardsLost
from service.engine.kv.backend import Blocks
from service.engine.model_runner import TransformersRunner
from service.engine.sequence import RowLength
from service.engine.shards import messages
from service.engine.shards.team import Team


class _Numbered(list[tuple[Tensor, Tensor]]):
    """Keys and values of this process's heads; the others keep those of theirs under the same number."""

    def __init__(self, number: int, blocks: Blocks) -> None:
        super().__init__(blocks)
        self.number = number


class LeadingRunner:
    """Implements `ModelRunner` over its own part and a team.

    A step is sent before it is run, as everyone meets in every layer; all else is sent once it is done here. A step
    that fails everywhere has not happened and may be tried again; any other failure ends the model, with ShardsLost.
    """

    def __init__(self, runner: TransformersRunner, team: Team) -> None:
        self._runner = runner
        self._team = team
        self._numbers = count()
        self._unread: deque[int] = deque()  # numbers of keys and values that are gone here
        self._sent: dict[str, weakref.ref[AdapterFactors]] = {}

    @property
    def rows(self) -> int:
        return self._runner.rows

    @property
    def ragged(self) -> bool:
        return self._runner.ragged

    def spare(self, lengths: Sequence[RowLength]) -> int:
        return self._runner.spare(lengths)

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """Of one process: every other takes as much."""
        return self._runner.kv_bytes

    def add(self, rows: int) -> None:
        self._runner.add(rows)
        self._team.tell(messages.Add(rows))

    def keep(self, rows: Sequence[int]) -> None:
        self._runner.keep(rows)
        self._team.tell(messages.Keep(tuple(rows)))

    def extend(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        batch: LowRankBatch | None,
        *,
        every_position: bool = False,
    ) -> Tensor:
        self._forget()
        mix = None if batch is None else self._mix(batch)
        self._team.tell(messages.Extend(tuple(rows), [list(each) for each in tokens], mix, every_position))
        try:
            token_logits = self._runner.extend(rows, tokens, batch, every_position=every_position)
        except Exception as error:
            self._check_all_failed(error)
            raise
        for failure in self._team.answers():
            if failure is not None:
                raise ShardsLost(f"a part of the model failed where others did not: {failure}")
        return token_logits

    def read(self, row: int, start: int, end: int) -> Blocks:
        blocks = _Numbered(next(self._numbers), self._runner.read(row, start, end))
        weakref.finalize(blocks, self._unread.append, blocks.number).atexit = False
        self._team.tell(messages.Read(blocks.number, row, start, end))
        return blocks

    def write(self, row: int, *pieces: Blocks) -> None:
        """What this runner has read, and nothing else."""
        numbers = tuple(piece.number for piece in pieces if isinstance(piece, _Numbered))
        assert len(numbers) == len(pieces)
        self._runner.write(row, *pieces)
        self._team.tell(messages.Write(row, numbers))
        self._forget()

    def _forget(self) -> None:
        """Has the others let go of keys and values that nobody holds here any more."""
        numbers = []
        while self._unread:
            numbers.append(self._unread.popleft())
        if numbers:
            self._team.tell(messages.Forget(tuple(numbers)))

    def _check_all_failed(self, error: Exception) -> None:
        """Raises ShardsLost unless everyone failed as this process did: then all are where they were."""
        try:
            failures = self._team.answers(hurried=True)
        except ShardsLost as lost:
            raise ShardsLost(f"{lost}; this process's own part failed: {error}") from error
        if None in failures:
            raise ShardsLost(f"this process's part of the model failed where others did not: {error}") from error

    def _mix(self, batch: LowRankBatch) -> messages.Mix:
        self._share(batch.adapters)
        weights = tuple(tuple(of_row) for of_row in batch.weights.tolist())
        return messages.Mix(tuple(adapter.digest for adapter in batch.adapters), weights, batch.stacked)

    def _share(self, adapters: Sequence[AdapterFactors]) -> None:
        """Sends the adapters that the others lack, and has them drop those of which the factors are gone here."""
        wanted = {adapter.digest for adapter in adapters}
        gone = [digest for digest, of in self._sent.items() if of() is None and digest not in wanted]
        if gone:
            self._team.tell(messages.Drop(tuple(gone)))
        for digest in gone:
            del self._sent[digest]
        for adapter in adapters:
            if adapter.digest not in self._sent:
                assert adapter.whole is not None
                self._team.tell(messages.Hold(adapter.digest, adapter.whole))
            self._sent[adapter.digest] = weakref.ref(adapter)


def lead(runner: TransformersRunner, team: Team, batches: bool, rows: int, longest: int) -> LeadingRunner:
    """The runner of everyone together, once all have chosen alike and reserved memory alike. Raises ShardsLost."""
    for chosen in team.receive():
        if chosen != messages.Chosen(runner.kv.name, batches):
            raise ShardsLost(f"parts of the model found different key-value backends right: {runner.kv.name}, {chosen}")
    team.tell(messages.Reserve(rows, longest))
    return LeadingRunner(runner, team)
