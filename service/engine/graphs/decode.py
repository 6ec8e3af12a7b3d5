"""Decode steps by replay: which steps can be, and what they are told. Any other runs eagerly, one by one.

A batch's composition is data: rows join and leave, with whatever adapters, and the same graphs replay. Only keys and
values that outgrow what was reserved for them at load move, and then graphs are captured again, when next needed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from weakref import ref

from torch import Tensor

from adapters.kernels.residency import SlotResidency
from adapters.kernels.tables import RowTable
from adapters.layers import AdaptedModel
from adapters.low_rank import LowRankBatch
from service.engine.fatal import is_fatal
from service.engine.graphs.buckets import Bucket, Buckets
from service.engine.graphs.capture import GraphBackend, Step
from service.engine.graphs.static_step import StaticStep, StepBuffers
from service.engine.kv.slots import SlotBackend

log = logging.getLogger(__name__)


class DecodeGraphs:
    """Runs decode steps of one model over one slot backend. `replayed` and `eager`, by reason, count them."""

    def __init__(
        self,
        adapted: AdaptedModel,
        kv: SlotBackend,
        step: StaticStep,
        buffers: StepBuffers,
        rows: RowTable,
        residency: SlotResidency,
        buckets: Buckets,
        backend: GraphBackend,
    ) -> None:
        self._adapted = adapted
        self._kv = kv
        self._step = step
        self._buffers = buffers
        self._rows = rows
        self.buckets = buckets
        self._backend = backend
        self._replays: dict[Bucket, Step] = {}
        self._captured_at = kv.moves
        self._said: tuple[ref[LowRankBatch] | None, int, int] | None = None  # what the RowTable holds
        self._failed = False
        self.residency = residency
        self.replayed = self.eager_steps = 0  # read by other threads
        self.eager: Counter[str] = Counter()

    @property
    def captures(self) -> int:
        return self._backend.captures

    def warm_up(self) -> None:
        """Captures every bucket, without rows. Raises whatever the model, the kernels or the device make of it."""
        self._rows.set([])
        self._buffers.tell([], [], scratch=self._kv.columns)
        for bucket in self.buckets.all():
            self._replay(bucket)

    def run(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], batch: LowRankBatch | None) -> Tensor | None:
        """Token logits [rows, vocabulary] on the CPU, or None: nothing happened, and the step is to be run eagerly."""
        if any(len(of_row) != 1 for of_row in tokens):
            return None
        answer = self._unfit(rows) or self._try([of_row[0] for of_row in tokens], batch)
        if isinstance(answer, Tensor):
            self.replayed += 1
            return answer
        self.eager[answer] += 1
        self.eager_steps += 1
        return None

    def _try(self, tokens: list[int], batch: LowRankBatch | None) -> Tensor | str:
        """The token logits, or why there are none."""
        starts = self._kv.begin_decode(len(tokens))
        bucket = self._bucket(max(starts) + 1, len(tokens))
        if bucket is None:
            return "size"
        try:
            return self._point_rows(batch, len(tokens)) or self._run(bucket, tokens, starts)
        except Exception as error:
            if is_fatal(error):
                raise
            self._failed = True
            log.warning("decode steps run without graphs from now on: one failed", exc_info=error)
            return "failed"

    def _unfit(self, rows: Sequence[int]) -> str | None:
        if self._failed:
            return "failed"
        if self._adapted.moved:
            return "folded"  # into a parameter that had been shared: graphs read the shared one
        if list(rows) != list(range(len(rows))):
            return "rows"
        return None

    def _bucket(self, length: int, rows: int) -> Bucket | None:
        """None too where so many columns or rows were given up for want of memory."""
        bucket = self.buckets.fitting(rows, length)
        if bucket is None or bucket.rows > self._kv.slots or bucket.columns > self._kv.columns:
            return None
        return bucket

    def _point_rows(self, batch: LowRankBatch | None, rows: int) -> str | None:
        """Makes the RowTable say what each row runs with; a reason if it, or the tables of adapters, cannot."""
        slots = {} if batch is None else self.residency.hold(batch.adapters)
        if slots is None:
            return "adapter"
        of_whom = None if batch is None else ref(batch)  # a batch must not outlive its rows here: it holds factors
        said = of_whom, rows, self.residency.filled
        if said != self._said:
            self._said = None
            by_row = [] if batch is None else _members(batch, slots, rows)
            if any(len(members) > self._rows.members for members in by_row):
                return "blend"
            self._rows.set(by_row)
            self._said = said
        return None

    def _run(self, bucket: Bucket, tokens: list[int], starts: list[int]) -> Tensor:
        self._buffers.tell(tokens, starts, scratch=self._kv.columns)
        self._replay(bucket)()
        token_logits = self._buffers.token_logits[: len(tokens)].to("cpu", copy=True)  # the next step overwrites them
        self._kv.commit()
        return token_logits

    def _replay(self, bucket: Bucket) -> Step:
        """Captured before, for the keys and values where they are now; else it is captured."""
        if self._captured_at != self._kv.moves:
            self._replays.clear()
            self._captured_at = self._kv.moves
        if bucket not in self._replays:
            self._replays[bucket] = self._backend.capture(partial(self._step.run, bucket))
        return self._replays[bucket]


def _members(batch: LowRankBatch, slots: Mapping[str, int], rows: int) -> list[list[tuple[int, float]]]:
    """Each row's (slot, weight) pairs."""
    places = [slots[adapter.digest] for adapter in batch.adapters]
    weights = batch.weights.tolist()
    return [
        [(slot, weight) for slot, weight in zip(places, of_row, strict=True) if weight]
        for of_row in (weights * rows if len(weights) == 1 else weights)
    ]
