"""What the engine asks of the worker that runs its model, whatever the task."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from adapters.factors import AdapterFactors
from adapters.merge import FoldReport
from service.engine.folding import Folding
from service.engine.job import Job
from service.engine.selection import Selection
from service.engine.sequence import RowLength, Sequence


class EngineWorker(Protocol):
    """What runs on the model's thread. `has_work` and the doors below it are the thread's; counts are read by any."""

    @property
    def folding(self) -> Folding: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def completion_tokens(self) -> int: ...

    @property
    def prefix_tokens(self) -> int: ...

    @property
    def prefix_bytes(self) -> int: ...

    @property
    def prefix_evicted_blocks(self) -> int: ...

    @property
    def kv_bytes(self) -> tuple[int, int]: ...

    @property
    def running(self) -> list[Sequence]: ...

    @property
    def max_batch_size(self) -> int: ...

    def can_ever_run(self, length: RowLength) -> bool: ...

    @property
    def has_work(self) -> bool: ...

    def admit(self, job: Job) -> None: ...

    def step(self) -> None: ...

    def fold(self, selection: Selection, factors: Seq[AdapterFactors]) -> FoldReport: ...
