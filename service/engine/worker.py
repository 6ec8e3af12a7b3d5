"""What happens on the model's thread: jobs join the batch, take steps together, and leave it.

    admit what there is room for → fold or restore the base weights, as the rows ask
        → run a part of their prompts → decode one token of everyone else

The worker has no thread of its own and no lock: whoever calls it owns the model. What goes wrong with one request ends
that request; only an error that leaves the device's state unknown leaves `step`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Seq
from functools import partial

import torch
from torch import Tensor

from adapters.factors import AdapterFactors, FactorStack
from adapters.merge import FoldReport, Merger
from service.engine import sampler
from service.engine.auto_merge import AutoMerge
from service.engine.events import FinishReason
from service.engine.failure import BROKEN, optional
from service.engine.fatal import is_fatal
from service.engine.folding import Folding
from service.engine.job import Choice, Job
from service.engine.mixing import Mixing
from service.engine.model_runner import ModelRunner
from service.engine.owners import Owners
from service.engine.prefix_cache import PrefixCache, common_blocks
from service.engine.sampler import SamplingRow
from service.engine.scheduler import Chunk, Limits, Scheduler
from service.engine.selection import Selection
from service.engine.sequence import RowLength, Sequence, SequenceStatus

log = logging.getLogger(__name__)

_WORTH_PADDING = 32  # tokens: about what a forward costs, however small it is (measured on a CPU)

Answer = tuple[Sequence, Tensor]  # a sequence and its token logits [vocabulary]


class Worker:
    """The running batch over one model."""

    def __init__(
        self,
        runner: ModelRunner,
        merger: Merger,
        limits: Limits,
        eos_token_ids: frozenset[int] = frozenset(),
        prefixes: PrefixCache | None = None,
        auto_merge: AutoMerge | None = None,
        stack: FactorStack | None = None,
        opening: Seq[int] | None = None,
    ) -> None:
        """`opening` is what every output begins after where an encoder reads the prompts; None: after its prompt."""
        self._runner = runner
        self._opening = opening
        self._scheduler = Scheduler(limits)
        self._eos = eos_token_ids
        self._prefixes = prefixes
        self._owners = Owners()
        self._mixing = Mixing(stack if stack is not None else FactorStack(), self._owners.factors)
        self.folding = Folding(merger, auto_merge)
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

    @property
    def prefix_bytes(self) -> int:
        return 0 if self._prefixes is None else self._prefixes.nbytes

    @property
    def prefix_evicted_blocks(self) -> int:
        return 0 if self._prefixes is None else self._prefixes.evicted_blocks

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """What the running rows' tokens take, and all the memory for keys and values. From any thread."""
        return self._runner.kv_bytes

    def can_ever_run(self, length: RowLength) -> bool:
        """Whether a row may grow to this length when it has all the memory to itself. From any thread."""
        return self._runner.spare([length]) >= 0

    def admit(self, job: Job) -> None:
        """Takes a job whose adapters are loaded. Its choices wait for room in the batch."""
        self._owners.add(job)
        self._scheduler.add(job.sequences)

    def step(self) -> None:
        """A part of the prompts of those that joined, and one token of every other row."""
        self._drop_finished()
        self._join()
        self._line_up()
        self.folding.follow(self._scheduler.running, self._owners.factors)
        decoding = self._scheduler.decoding  # before the prefill: a row takes one token a step
        self._prefill()
        self._drop_finished()
        self._decode([sequence for sequence in decoding if sequence.status is SequenceStatus.RUNNING])
        self._drop_finished()

    def fold(self, selection: Selection, factors: Seq[AdapterFactors]) -> FoldReport:
        """Folds a selection into the base weights now, and says what that lost."""
        return self.folding.fold(selection, factors)

    # --- joining ----------------------------------------------------------------------------------

    def _join(self) -> None:
        joining = self._scheduler.admit(self._fits, self._is_ready)
        if not joining:
            return
        first = self._runner.rows
        try:
            self._runner.add(len(joining))
        except Exception as error:
            self._owners.fail(joining, error)
            self._drop_finished()
            return
        for row, sequence in enumerate(joining, first):
            self._take_prefix(row, sequence)

    def _line_up(self) -> None:
        """Rows that decode stand before those whose prompts still run, so that the model reads them in place."""
        rows = self._scheduler.line_up()
        if rows is not None:
            self._keep(rows)

    def _keep(self, rows: Seq[int]) -> None:
        """Keeps these rows, in this order. If they cannot be moved, their requests fail and all rows are given up."""
        try:
            self._runner.keep(rows)
        except Exception as error:
            self._owners.fail(self._scheduler.running, error)
            self._scheduler.remove_finished()
            self._runner.keep([])

    def _fits(self, lengths: Seq[RowLength]) -> bool:
        """Whether rows of these lengths fit; cached prefixes make room for them."""
        spare = self._runner.spare(lengths)
        if self._prefixes is not None and spare >= 0:
            self._prefixes.shrink_to(spare)
        return spare >= 0

    def _is_ready(self, sequence: Sequence) -> bool:
        """Not while a row is just running a beginning that this one could take from the cache afterwards.

        Nor before the choice that scores the prompt is done with it: its log-probabilities are sent first.
        """
        if sequence.is_scored:
            return True
        if self._owners.job(sequence).is_scoring:
            return False
        if self._prefixes is None:
            return True
        owner, prompt = sequence.prefix_owner, sequence.request.prompt_ids
        shared = [
            common_blocks(prompt[:-1], other.request.prompt_ids)
            for other in self._scheduler.running
            if other.is_prefilling and other.prefix_owner == owner
        ]
        return not shared or max(shared) <= self._prefixes.matched_tokens(owner, prompt)

    def _take_prefix(self, row: int, sequence: Sequence) -> None:
        if self._prefixes is None or sequence.is_scored:
            return
        hit = self._prefixes.match(sequence.prefix_owner, sequence.request.prompt_ids)
        with optional("a prefix was not reused"):
            if hit.tokens:
                self._runner.write(row, *hit.pieces)
            sequence.prefilled = sequence.cached = hit.tokens
            self.prefix_tokens += hit.tokens
        hit.release()

    # --- forwards ---------------------------------------------------------------------------------

    def _prefill(self) -> None:
        for chunks in self._together(self._scheduler.prefill()):
            complete = []
            counts = {chunk.sequence: len(chunk.tokens) for chunk in chunks}
            scored = chunks[0].sequence.is_scored
            answers = self._forward(list(counts), [chunk.tokens for chunk in chunks], every_position=scored)
            for sequence, token_logits in answers:
                if scored:
                    with self._owners.blaming(sequence):
                        self._score(sequence, token_logits[-counts[sequence] :])
                    token_logits = token_logits[-1]
                sequence.prefilled += counts[sequence]
                self.prompt_tokens += counts[sequence]
                if not sequence.is_prefilling:
                    complete.append((sequence, token_logits))
            self._take_tokens(complete)  # as soon as there are any: the first token is what users wait for
            for sequence, token_logits in complete:
                if not _broken(token_logits):
                    self._keep_prefix(sequence)

    def _together(self, chunks: Seq[Chunk]) -> list[list[Chunk]]:
        """The chunks that share a forward: of one length, or of lengths so alike that padding costs less than another.

        The first chunks first, as they were scheduled, and with each those that it can take along. Prompts to be scored
        stay among themselves, as every position of theirs is answered.
        """
        padding = _WORTH_PADDING if self._runner.ragged else 0
        forwards: list[list[Chunk]] = []
        for chunk in sorted(chunks, key=lambda chunk: (chunk.sequence.is_scored, -len(chunk.tokens))):
            first = forwards[-1][0] if forwards else None
            if (
                first is None
                or first.sequence.is_scored != chunk.sequence.is_scored
                or len(first.tokens) - len(chunk.tokens) > padding
            ):
                forwards.append([])
            forwards[-1].append(chunk)
        turn = {chunk.sequence: turn for turn, chunk in enumerate(chunks)}
        return sorted(forwards, key=lambda forward: min(turn[chunk.sequence] for chunk in forward))

    def _score(self, sequence: Sequence, token_logits: Tensor) -> None:
        """Reports how likely the prompt's next tokens were, from token_logits [positions, vocabulary]."""
        job, start = self._owners.job(sequence), sequence.prefilled
        if job.ended:
            return
        if bool(_broken(token_logits).any()):
            job.fail("internal_error", BROKEN)
            return
        following = sequence.request.prompt_ids[start + 1 : start + 1 + len(token_logits)]
        top = sequence.params.prompt_logprobs or 0
        job.take_prompt_logprobs(sampler.logprobs(token_logits[: len(following)], following, top))

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Keeps the state of a prompt, unless running rows may yet need the memory."""
        if self._prefixes is None:
            return
        running = self._scheduler.running
        read = partial(self._runner.read, running.index(sequence))
        with optional("a prefix was not kept"):
            self._prefixes.insert(sequence.prefix_owner, sequence.request.prompt_ids, read)
        self._prefixes.shrink_to(self._runner.spare([each.final_length for each in running]))

    def _decode(self, decoding: list[Sequence]) -> None:
        if not decoding:
            return
        began = time.perf_counter()
        answers = self._forward(decoding, [[sequence.last_token] for sequence in decoding])
        self.folding.observe_step(self._scheduler.running, time.perf_counter() - began)
        for sequence, _ in answers:
            self._scheduler.charge(sequence, 1)
        self._take_tokens(answers)

    def _forward(
        self, sequences: list[Sequence], tokens: list[Seq[int]], *, every_position: bool = False
    ) -> list[Answer]:
        """One forward over some rows. If it raises it is halved and tried again, until the guilty row fails alone."""
        for sequence in sequences:
            self._owners.job(sequence).mark_step(folded=self.folding.is_folded)
        try:
            running = self._scheduler.running
            row_of = {sequence: row for row, sequence in enumerate(running)}
            batch = None if self.folding.is_folded else self._mixing.batch(sequences, running)
            rows = [row_of[sequence] for sequence in sequences]
            token_logits = self._runner.extend(rows, tokens, batch, every_position=every_position)
        except Exception as error:
            if len(sequences) == 1 or is_fatal(error):
                self._owners.fail(sequences, error)
                return []
        else:
            return list(zip(sequences, token_logits, strict=True))
        # Out here the error is gone, and with its traceback what the forward held in memory: it may have been too much.
        half = len(sequences) // 2
        halves = (sequences[:half], tokens[:half]), (sequences[half:], tokens[half:])
        return [answer for each in halves for answer in self._forward(*each, every_position=every_position)]

    # --- tokens -----------------------------------------------------------------------------------

    def _take_tokens(self, answers: list[Answer]) -> None:
        if not answers:
            return
        token_logits = torch.stack([of_row for _, of_row in answers])
        rows: dict[int, SamplingRow] = {}
        for i, ((sequence, _), is_broken) in enumerate(zip(answers, _broken(token_logits).tolist(), strict=True)):
            job, choice = self._owners.of(sequence)
            if job.ended:
                continue
            if is_broken:
                job.fail("internal_error", BROKEN)
            elif sequence.params.max_new_tokens == 0:
                with self._owners.blaming(sequence):
                    job.finish_without_tokens(choice)
            else:
                with self._owners.blaming(sequence):
                    rows[i] = self._sampling_row(choice)
        if not rows:
            return
        for i, token in self._sample([sequence for sequence, _ in answers], token_logits, rows).items():
            sequence = answers[i][0]
            job, choice = self._owners.of(sequence)
            if job.ended:
                continue
            with self._owners.blaming(sequence):
                self._take_token(job, choice, token, token_logits[i])

    def _sample(self, sequences: Seq[Sequence], token_logits: Tensor, rows: dict[int, SamplingRow]) -> dict[int, int]:
        """A token by row. Rows that cannot be sampled together are sampled alone, so that only the guilty one fails.

        One that had drawn its number by then draws another: here alone a seed's text may change.
        """
        try:
            of_rows = token_logits if len(rows) == len(token_logits) else token_logits[list(rows)]
            return dict(zip(rows, sampler.sample(of_rows, list(rows.values())), strict=True))
        except Exception as error:
            if is_fatal(error):
                raise
            log.warning("rows could not be sampled together: %s", error)
        chosen = {}
        for i, row in rows.items():
            with self._owners.blaming(sequences[i]):
                (chosen[i],) = sampler.sample(token_logits[i : i + 1], [row])
        return chosen

    def _take_token(self, job: Job, choice: Choice, token: int, token_logits: Tensor) -> None:
        params = choice.sequence.params
        wanted = params.logprobs
        logprob = None if wanted is None else sampler.logprobs(token_logits.unsqueeze(0), [token], wanted)[0]
        if choice.guide is not None:
            choice.guide.accept(token)
        ends = token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
        complete = ends or (choice.guide is not None and choice.guide.complete)
        full = len(choice.sequence.output_ids) + 1 >= params.max_new_tokens
        reason = FinishReason.STOP if complete else FinishReason.LENGTH if full else None
        self.completion_tokens += 1
        job.take_token(choice, token, reason, logprob, hidden=ends)

    def _sampling_row(self, choice: Choice) -> SamplingRow:
        sequence = choice.sequence
        return SamplingRow(
            sequence.params,
            choice.generator,
            sequence.request.prompt_ids if self._opening is None else self._opening,
            sequence.output_ids,
            None if choice.guide is None else choice.guide.allowed(),
        )

    def _drop_finished(self) -> None:
        rows = self._scheduler.remove_finished()
        if rows is not None:
            self._keep(rows)
        alive = set(self._scheduler)
        self._owners.keep(alive)
        if not alive:
            self._mixing.let_go()
            self.folding.forget_failures()


def _broken(token_logits: Tensor) -> Tensor:
    """Which rows [..., vocabulary] hold NaN, which is not less either, or infinity."""
    return ~(token_logits < torch.inf).all(-1)
