"""The seam between the HTTP layer and the engine: what `service.api` may ask, and what tests may fake."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from adapters.merge import FoldReport
from service.engine.events import EventSink
from service.engine.selection import Selection
from service.engine.sequence import GenerationRequest


class EngineState(Enum):
    """READY takes requests; DRAINING finishes those it has; STOPPED was asked to end; DEAD lost its thread."""

    READY = auto()
    DRAINING = auto()
    STOPPED = auto()
    DEAD = auto()


@dataclass(frozen=True, slots=True)
class BatchShare:
    """The rows of the batch that run one selection for one tenant."""

    tenant: str
    selection: Selection
    rows: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One moment of the engine: choices waiting and running, adapters in the batch, tokens and folds since start.

    `prompt_tokens` were run, `prefix_tokens` found in the prefix cache, which holds `prefix_bytes` and has dropped
    `prefix_evicted_blocks` blocks. Folds and restores took `fold_s` and `restore_s` seconds. Of the memory for keys and
    values, `kv_budget_bytes`, the tokens of running rows take `kv_bytes`. Where there are graphs, `replayed_steps` were
    replayed and `eager_steps` fitted none. `batch` says what the running choices are, in no order.
    """

    waiting: int
    running: int
    distinct_adapters: int
    prompt_tokens: int
    completion_tokens: int
    folds: int
    prefix_tokens: int = 0
    prefix_bytes: int = 0
    prefix_evicted_blocks: int = 0
    fold_s: float = 0.0
    restores: int = 0
    restore_s: float = 0.0
    kv_bytes: int = 0
    kv_budget_bytes: int = 0
    replayed_steps: int = 0
    eager_steps: int = 0
    batch: tuple[BatchShare, ...] = ()


class Engine(Protocol):
    """Answers generation requests. Every method may be called from any thread and none blocks for a step."""

    @property
    def state(self) -> EngineState: ...

    @property
    def max_context(self) -> int:
        """The most tokens, prompt and output together, that one request may have."""
        ...

    @property
    def max_batch_size(self) -> int:
        """The rows of a batch, those aside that are held in reserve for selections without one."""
        ...

    @property
    def max_queue(self) -> int:
        """The choices that may be accepted and not yet running."""
        ...

    def check_room(self) -> None:
        """Raises what `submit` would for any request now: Overloaded, EngineUnavailable.

        So that one that will be refused is so before its prompt is encoded. That there is room now promises nothing.
        """
        ...

    def submit(self, requests: Sequence[GenerationRequest], sink: EventSink) -> None:
        """Accepts requests, all or none. Their events go to `sink`, from the engine's threads, each one's ending in one
        terminal event.

        Raises EngineError instead of accepting: InvalidRequest, ContextLengthExceeded, Overloaded, EngineUnavailable.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a request: its choices finish as `cancelled`. Unknown and finished ids are ignored."""
        ...

    def fold(self, selection: Selection) -> Future[FoldReport]:
        """Folds a selection into the base weights when the batch allows, and says what rounding that cost.

        The future fails with EngineUnavailable if the engine ends first.
        """
        ...

    def stats(self) -> EngineStats: ...

    def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the accepted ones to end; False when some were still running."""
        ...

    def stop(self) -> None:
        """Ends the thread; requests still running fail. Blocks until it has ended; calling it again does nothing."""
        ...
