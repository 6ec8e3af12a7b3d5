"""What happens on the model's thread: jobs join the batch, take steps together, and leave it.

A step reads: one more token of every running row → admit what waits → run its prompts. Before either forward the base
weights are folded or restored as the rows ask. The worker has no thread of its own and no lock: whoever calls it owns
the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from adapters.errors import AdapterError
from adapters.layers import AdapterFactors, LowRankBatch
from adapters.merge import FoldReport, Merger
from service.engine import sampler
from service.engine.events import FinishReason, TokenLogprob
from service.engine.job import Choice, Job
from service.engine.model_runner import ModelRunner
from service.engine.sampler import SamplingRow
from service.engine.scheduler import Scheduler, foldable
from service.engine.selection import Selection
from service.engine.sequence import Sequence

log = logging.getLogger(__name__)

Forward = Callable[[LowRankBatch | None], Tensor]
Mix = tuple[tuple[tuple[str, float], ...], ...]  # the selection key of every row


class Worker:
    """The running batch over one model."""

    def __init__(
        self, runner: ModelRunner, merger: Merger, max_batch_size: int, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self._runner = runner
        self._merger = merger
        self._scheduler = Scheduler(max_batch_size)
        self._eos = eos_token_ids
        self._owners: dict[Sequence, tuple[Job, Choice]] = {}
        self._folded: Selection | None = None
        self._mix: tuple[Mix, LowRankBatch | None] = ((), None)
        self._unfoldable: set[object] = set()
        self.prompt_tokens = self.completion_tokens = self.folds = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def running(self) -> list[Sequence]:
        return self._scheduler.running

    def admit(self, job: Job) -> None:
        """Takes a job whose adapters are loaded. Its choices wait for room in the batch."""
        for choice in job.choices:
            self._owners[choice.sequence] = (job, choice)
        self._scheduler.add(job.sequences)

    def step(self) -> None:
        """One token for every running row, and the first one for the rows that join."""
        self._drop_finished()
        if decoding := self._scheduler.running:
            self._run(decoding, lambda batch: self._runner.decode([s.last_token for s in decoding], batch))
            self._drop_finished()
        if joining := self._scheduler.admit():
            self._run(joining, lambda batch: self._runner.prefill([s.request.prompt_ids for s in joining], batch))
            self.prompt_tokens += sum(len(s.request.prompt_ids) for s in joining)
        self._drop_finished()

    def fold(self, selection: Selection, factors: SequenceOf[AdapterFactors]) -> FoldReport:
        """Folds a selection into the base weights now. The next step restores them if its rows want something else."""
        weights = [adapter.weight for adapter in selection.adapters]
        self._folded = None  # what was folded is restored first, also when the fold fails
        report = self._merger.fold(list(zip(factors, weights, strict=True)))
        self._folded = selection
        self.folds += 1
        return report

    def _run(self, sequences: list[Sequence], forward: Forward) -> None:
        """One forward over some rows, then one token for each. If it raises, those rows' requests fail."""
        self._fold_or_restore()
        folded = self._folded is not None
        for sequence in sequences:
            self._owners[sequence][0].mark_step(folded=folded)
        try:
            token_logits = forward(None if folded else self._low_rank(sequences))
        except Exception as error:
            log.exception("a forward over %d rows failed", len(sequences))
            code, message = failure(error)
            for sequence in sequences:
                self._owners[sequence][0].fail(code, message)
            return
        self._take_tokens(sequences, token_logits)

    def _fold_or_restore(self) -> None:
        """Folded only while every row of the batch has the one selection that asked for it."""
        wanted = foldable(self._scheduler.running)
        if self._folded is not None and (wanted is None or wanted.key != self._folded.key):
            self._merger.restore()
            self._folded = None
        if self._folded is None and wanted is not None and wanted.key not in self._unfoldable:
            self._try_fold(wanted, self._owners[self._scheduler.running[0]][0].factors)

    def _try_fold(self, selection: Selection, factors: SequenceOf[AdapterFactors]) -> None:
        """Merging is a preference: what cannot be folded runs beside the weights, and is not tried again."""
        try:
            self.fold(selection, factors)
        except Exception as error:
            log.warning("%s cannot be folded: %s", selection.header, error)
            self._unfoldable.add(selection.key)

    def _low_rank(self, sequences: list[Sequence]) -> LowRankBatch | None:
        """The low-rank part for these rows, kept from the last step while the rows' selections stay the same."""
        mix = tuple(sequence.selection.key for sequence in sequences)
        if mix != self._mix[0]:
            self._mix = (mix, self._mixed_batch(sequences))
        return self._mix[1]

    def _mixed_batch(self, sequences: list[Sequence]) -> LowRankBatch | None:
        factors: dict[str, AdapterFactors] = {}
        for sequence in sequences:
            factors.update({adapter.digest: adapter for adapter in self._owners[sequence][0].factors})
        if not factors:
            return None
        column = {digest: i for i, digest in enumerate(factors)}
        weights = torch.zeros(len(sequences), len(factors))
        for row, sequence in enumerate(sequences):
            for adapter in sequence.selection.adapters:
                weights[row, column[adapter.digest]] += adapter.weight
        return LowRankBatch(list(factors.values()), weights)

    def _take_tokens(self, sequences: list[Sequence], token_logits: Tensor) -> None:
        broken = token_logits.isnan().any(-1).tolist()
        rows = [self._sampling_row(sequence) for sequence in sequences]
        tokens = sampler.sample(token_logits.nan_to_num(), rows)
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            job, choice = self._owners[sequence]
            if job.ended:
                continue
            if broken[i]:
                job.fail("internal_error", "the model answered NaN; is the adapter or the dtype at fault?")
                continue
            wanted = sequence.params.logprobs
            logprob = None if wanted is None else sampler.logprobs(token_logits[i], token, wanted)
            self._take_token(job, choice, token, logprob)

    def _take_token(self, job: Job, choice: Choice, token: int, logprob: TokenLogprob | None) -> None:
        params = choice.sequence.params
        ends = token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
        full = len(choice.sequence.output_ids) + 1 >= params.max_new_tokens
        reason = FinishReason.STOP if ends else FinishReason.LENGTH if full else None
        self.completion_tokens += 1
        job.take_token(choice, token, reason, logprob, hidden=ends)

    def _sampling_row(self, sequence: Sequence) -> SamplingRow:
        history = sequence.all_ids() if sequence.params.repetition_penalty != 1.0 else ()
        return SamplingRow(sequence.params, self._owners[sequence][1].generator, history)

    def _drop_finished(self) -> None:
        rows = self._scheduler.remove_finished()
        if rows is not None:
            self._runner.keep(rows)
        alive = set(self._scheduler)
        for sequence in [s for s in self._owners if s not in alive]:
            del self._owners[sequence]
        if not alive:
            self._mix = ((), None)  # lets go of factors that may be evicted now
            self._unfoldable.clear()


def failure(error: Exception) -> tuple[str, str]:
    """The error envelope's code and message for an exception that ended a request."""
    if isinstance(error, AdapterError):
        return error.code, error.message
    return "internal_error", "the engine failed on this request; the server's log says why"
