"""What happens on the model's thread where texts are read once: those that fit run together, and are done.

    admit what there is room for → fold or restore the base weights, as the rows ask
        → one forward for all texts of like length

The worker has no thread of its own and no lock: whoever calls it owns the model. Scheduling, folding and mixing are
those of generation; what goes wrong with one request ends that request.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.factors import AdapterFactors, FactorStack
from adapters.heads import ClassifierHead
from adapters.low_rank import LowRankBatch
from adapters.merge import FoldReport, Merger
from service.engine.failure import BROKEN
from service.engine.fatal import is_fatal
from service.engine.folding import Folding
from service.engine.job import Job
from service.engine.mixing import Mixing
from service.engine.owners import Owners
from service.engine.pooling.runner import PooledText, PoolingRunner
from service.engine.scheduler import Limits, Scheduler
from service.engine.selection import Selection
from service.engine.sequence import RowLength, Sequence

log = logging.getLogger(__name__)

_WORTH_PADDING = 32  # tokens: about what a forward costs, however small it is (as in generation)


@dataclass(frozen=True, slots=True)
class PoolingLimits:
    """`tokens` bounds one forward, padding included; a longer text runs alone."""

    rows: Limits
    tokens: int


class PoolingWorker:
    """The texts that are read in a step, over one model. `head` is a classifier's: each row answers its own part."""

    kv_bytes = (0, 0)
    prefix_bytes = prefix_evicted_blocks = 0

    def __init__(
        self,
        runner: PoolingRunner,
        merger: Merger,
        limits: PoolingLimits,
        *,
        head: ClassifierHead | None = None,
        stack: FactorStack | None = None,
    ) -> None:
        self._runner = runner
        self._tokens = limits.tokens
        self._scheduler = Scheduler(limits.rows)
        self._head = head
        self._owners = Owners()
        self._mixing = Mixing(stack if stack is not None else FactorStack(), self._owners.factors)
        self._heads = Mixing(FactorStack(), self._heads_of)
        self.folding = Folding(merger)
        self.prompt_tokens = self.completion_tokens = self.prefix_tokens = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def running(self) -> list[Sequence]:
        return self._scheduler.running

    @property
    def max_batch_size(self) -> int:
        return self._scheduler.max_batch_size

    def can_ever_run(self, length: RowLength) -> bool:
        """Any text within the context does: nothing is kept of it."""
        return True

    def admit(self, job: Job) -> None:
        """Takes a job whose adapters are loaded. It waits for room in the batch."""
        self._owners.add(job)
        self._scheduler.add(job.sequences)

    def fold(self, selection: Selection, factors: Seq[AdapterFactors]) -> FoldReport:
        """Folds a selection into the base weights now, and says what that lost."""
        return self.folding.fold(selection, factors)

    def step(self) -> None:
        """Reads the texts that join, whole, and answers them."""
        self._drop_finished()
        joined = self._scheduler.admit(self._fits)
        self.folding.follow(joined, self._owners.factors)
        for texts in self._together(joined):
            for sequence, vector in self._forward(texts):
                self.prompt_tokens += len(sequence.request.prompt_ids)
                self._answer(sequence, vector)
        self._drop_finished()

    def _fits(self, lengths: Seq[RowLength]) -> bool:
        return len(lengths) * max(length.prompt for length in lengths) <= self._tokens

    def _together(self, sequences: Seq[Sequence]) -> Iterator[list[Sequence]]:
        """Those that share a forward: of one length, or of lengths so alike that padding costs less than another."""
        padding = _WORTH_PADDING if self._runner.ragged else 0
        texts: list[Sequence] = []
        for sequence in sorted(sequences, key=_length, reverse=True):
            if texts and _length(texts[0]) - _length(sequence) > padding:
                yield texts
                texts = []
            texts.append(sequence)
        if texts:
            yield texts

    def _forward(self, sequences: list[Sequence]) -> list[tuple[Sequence, Tensor]]:
        """One forward over some texts. If it raises it is halved and tried again, until the guilty one fails alone."""
        for sequence in sequences:
            self._owners.job(sequence).mark_step(folded=self.folding.is_folded)
        texts = [PooledText(s.request.prompt_ids, s.request.token_types) for s in sequences]
        try:
            vectors = self._runner.run(texts, self._low_rank(sequences))
        except Exception as error:
            if len(sequences) == 1 or is_fatal(error):
                self._owners.fail(sequences, error)
                return []
        else:
            return list(zip(sequences, vectors, strict=True))
        # Out here the error is gone, and with its traceback what the forward held in memory: it may have been too much.
        half = len(sequences) // 2
        return [*self._forward(sequences[:half]), *self._forward(sequences[half:])]

    def _low_rank(self, sequences: Seq[Sequence]) -> LowRankBatch | None:
        """What runs beside the weights: everything, or only the heads of what is folded in."""
        running = self._scheduler.running
        if not self.folding.is_folded:
            return self._mixing.batch(sequences, running)
        return None if self._head is None else self._heads.batch(sequences, running)

    def _answer(self, sequence: Sequence, vector: Tensor) -> None:
        """Ends a request with its own part of what the batch answered, [width]."""
        job, choice = self._owners.of(sequence)
        if job.ended:
            return
        with self._owners.blaming(sequence):
            own = vector if self._head is None else vector[: self._labels(sequence)]
            if not bool(torch.isfinite(own).all()):
                job.fail("internal_error", BROKEN)
            else:
                job.finish_pooled(choice, tuple(own.tolist()))

    def _labels(self, sequence: Sequence) -> int:
        """As many as the head has that the row ran with."""
        assert self._head is not None
        for factors in self._owners.factors(sequence):
            for parameter in factors.replaced.get(self._head.output, {}).values():
                return len(parameter)
        return self._head.labels

    def _heads_of(self, sequence: Sequence) -> Seq[AdapterFactors]:
        assert self._head is not None
        return [factors.head_alone(self._head.output) for factors in self._owners.factors(sequence)]

    def _drop_finished(self) -> None:
        self._scheduler.remove_finished()
        alive = set(self._scheduler)
        self._owners.keep(alive)
        if not alive:
            self._mixing.let_go()
            self._heads.let_go()
            self.folding.forget_failures()


def _length(sequence: Sequence) -> int:
    return len(sequence.request.prompt_ids)
