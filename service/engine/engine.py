"""The engine: one thread that owns the model, and the doors to it that any thread may use.

Requests come in by `submit`; a small pool of loaders pins their adapters, so that a cold adapter delays its own request
and no other; then the model's thread takes them into the running batch between two steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue

import torch

from adapters.factors import AdapterFactors
from adapters.merge import FoldReport
from adapters.registry import AdapterRegistry
from service.engine.detokenizer import Decoder
from service.engine.engine_worker import EngineWorker
from service.engine.errors import (
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    WrongTask,
)
from service.engine.events import EventSink
from service.engine.failure import failure
from service.engine.graphs.decode import DecodeGraphs
from service.engine.job import Job, make_job
from service.engine.limits import EngineLimits
from service.engine.owners import shares_of
from service.engine.seam import EngineState, EngineStats
from service.engine.selection import Selection
from service.engine.sequence import GenerationRequest, SequenceStatus
from service.engine.threads import compute_with

log = logging.getLogger(__name__)

_LOADERS = 2
_RETRY_AFTER_S = 1
_LAST_STEP_S = 2.0  # for the step under way to end in order when the engine is stopped
_STOPPED = "the server stopped before the request was finished"
_MOST_OVERTAKEN = 64  # a request that waits for memory is let pass by so many later ones, and by no more


class BatchEngine:
    """Implements `service.engine.seam.Engine` over a Worker and a registry."""

    def __init__(
        self,
        worker: EngineWorker,
        registry: AdapterRegistry,
        decoder: Decoder,
        limits: EngineLimits,
        *,
        kv_backend: str | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.kv_backend = kv_backend
        self._graphs = graphs
        self._worker = worker
        self._registry = registry
        self._decoder = decoder
        self._limits = limits
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._threads = torch.get_num_threads()  # the model's thread computes with as many as the one that builds it
        self._loaders = ThreadPoolExecutor(_LOADERS, "vblora-loader", initializer=compute_with, initargs=(1,))
        self._changed = threading.Condition()  # guards _jobs and _state
        self._jobs: dict[str, Job] = {}  # accepted and not ended, by request id
        self._parked: list[Job] = []  # accepted, waiting for memory for their adapters, the oldest first
        self._folds: set[Future[FoldReport]] = set()  # asked for and not answered
        self._state = EngineState.READY
        self._stopping = threading.Lock()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vblora-engine", daemon=True)

    def start(self) -> BatchEngine:
        self._thread.start()
        self._begun.wait()
        return self

    # --- called from any thread -------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def max_context(self) -> int:
        return self._limits.max_context

    @property
    def max_batch_size(self) -> int:
        return self._worker.max_batch_size

    @property
    def max_queue(self) -> int:
        return self._limits.max_queue

    def check_room(self) -> None:
        with self._changed:
            self._check_room(1)

    def submit(self, requests: Sequence[GenerationRequest], sink: EventSink) -> None:
        choices = sum(request.n for request in requests)
        self._limits.check_number(choices)
        for request in requests:
            self._check(request)
        jobs = [make_job(request, sink, self._decoder, self._ended) for request in requests]
        with self._changed:
            self._check_room(choices)
            self._check_ids(requests)
            self._jobs |= {job.request.request_id: job for job in jobs}
            for job in jobs:
                self._take(job)

    def cancel(self, request_id: str) -> None:
        self._inbox.put(lambda: self._cancel(request_id))

    def fold(self, selection: Selection) -> Future[FoldReport]:
        future: Future[FoldReport] = Future()
        with self._changed:
            if self._state is not EngineState.READY:
                raise EngineUnavailable(f"the server folds nothing now: its engine is {self._state.name.lower()}")
            self._folds.add(future)
            self._loaders.submit(self._load_and_fold, selection, future)
        return future

    def stats(self) -> EngineStats:
        running = [] if self._state is EngineState.DEAD else self._worker.running  # what it left runs no more
        digests = {adapter.digest for sequence in running for adapter in sequence.selection.adapters}
        with self._changed:
            queued = self._queued()
        kv_bytes, kv_budget_bytes = self._worker.kv_bytes
        return EngineStats(
            waiting=queued,
            running=len(running),
            distinct_adapters=len(digests),
            prompt_tokens=self._worker.prompt_tokens,
            completion_tokens=self._worker.completion_tokens,
            folds=self._worker.folding.folds,
            prefix_tokens=self._worker.prefix_tokens,
            prefix_bytes=self._worker.prefix_bytes,
            prefix_evicted_blocks=self._worker.prefix_evicted_blocks,
            fold_s=self._worker.folding.fold_s,
            restores=self._worker.folding.restores,
            restore_s=self._worker.folding.restore_s,
            kv_bytes=kv_bytes,
            kv_budget_bytes=kv_budget_bytes,
            replayed_steps=0 if self._graphs is None else self._graphs.replayed,
            eager_steps=0 if self._graphs is None else self._graphs.eager_steps,
            batch=shares_of(running),
        )

    def die(self, error: Exception) -> None:
        """Ends the engine as if its own thread had met this error."""

        def meet() -> None:
            if self._state in (EngineState.READY, EngineState.DRAINING):
                raise error

        self._inbox.put(meet)

    def drain(self, timeout_s: float) -> bool:
        with self._changed:
            if self._state is EngineState.READY:
                self._state = EngineState.DRAINING
            return self._changed.wait_for(lambda: not self._jobs, timeout_s)

    def stop(self) -> None:
        with self._changed:
            if self._state is not EngineState.DEAD:
                self._state = EngineState.STOPPED
        self._inbox.put(lambda: None)
        with self._stopping:  # two callers may hurry it; one at a time ends what is left
            if self._begun.is_set():
                self._thread.join(_LAST_STEP_S)
                if self._thread.is_alive():
                    log.warning("a step is still under way: its requests are failed without it")
                self._give_up_all()  # before what may take long, or for ever: a step, a file
                self._thread.join()
            self._loaders.shutdown(wait=True)
            self._fail_all(_STOPPED)
            self._run_commands()  # what the loaders handed over last, so that its pins are given back

    def _check_room(self, choices: int) -> None:
        """Whether so many may be accepted now. Under the lock."""
        if self._state is not EngineState.READY:
            raise EngineUnavailable(f"the server takes no requests now: its engine is {self._state.name.lower()}")
        queued = self._queued()
        if queued + choices > self._limits.max_queue:
            raise Overloaded(
                f"{queued} choices are waiting and the queue takes {self._limits.max_queue}; try again later",
                retry_after_s=_RETRY_AFTER_S,
            )

    def _queued(self) -> int:
        """Choices accepted and not yet running."""
        return sum(s.status is SequenceStatus.WAITING for job in self._jobs.values() for s in job.sequences)

    def _check_ids(self, requests: Sequence[GenerationRequest]) -> None:
        """Under the lock."""
        for request in requests:
            if request.request_id in self._jobs:
                raise InvalidRequest(f"a request with the id {request.request_id!r} is already running")

    def _take(self, job: Job) -> None:
        """Sets an accepted job going. Under the lock."""
        if not self._may_pin(job):
            self._park(job)
        elif not self._take_loaded(job):
            self._loaders.submit(self._load, job)
        if job.deadline is not None:
            self._inbox.put(lambda: None)  # the engine's thread may be asleep with no deadline to wake it

    def _check(self, request: GenerationRequest) -> None:
        if request.task is not self._limits.task:
            raise WrongTask(request.task, self._limits.task)
        if not request.prompt_ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        self._limits.check_length(request.final_length)
        if not self._worker.can_ever_run(request.final_length):
            raise InvalidRequest(
                f"keys and values of {request.final_length.total} tokens take more memory than --kv-memory allows; "
                "shorten the prompt or ask for fewer tokens",
                param="prompt",
            )
        self._limits.check_tokens(request)

    def _take_loaded(self, job: Job) -> bool:
        """Hands a job over whose adapters are all in memory: it need not wait behind those that are being loaded."""
        pinned: list[AdapterFactors] = []
        for adapter in job.request.selection.adapters:
            factors = self._registry.pin_loaded(adapter.digest)
            if factors is None:
                if pinned:
                    self._unpin(tuple(pinned))
                return False
            pinned.append(factors)
        job.factors = tuple(pinned)
        self._overtake(job)
        self._inbox.put(lambda: self._admit(job))
        return True

    def _may_pin(self, job: Job) -> bool:
        """Whether there is memory for its adapters, and it is its turn. Under the lock."""
        digests = [adapter.digest for adapter in job.request.selection.adapters]
        if not digests:
            return True
        if any(older.overtaken >= _MOST_OVERTAKEN for older in self._before(job)):
            return False
        return self._registry.has_room_for(digests)

    def _park(self, job: Job) -> None:
        """Until another request gives its pins back. Under the lock."""
        self._parked.append(job)
        self._parked.sort(key=lambda parked: parked.submitted)

    def _overtake(self, job: Job) -> None:
        """Its adapters are pinned: those that have waited longer let it pass. Under the lock."""
        if job.request.selection.adapters:
            for older in self._before(job):
                older.overtaken += 1

    def _before(self, job: Job) -> list[Job]:
        """The parked jobs that came before this one."""
        return [parked for parked in self._parked if parked.submitted < job.submitted]

    # --- on a loader's thread ---------------------------------------------------------------------

    def _load(self, job: Job) -> None:
        if job.ended:
            return
        with self._changed:
            if not self._may_pin(job):
                self._park(job)
                return
        try:
            factors = self._pin(job.request.selection)
            with self._changed:
                job.factors = factors
                self._overtake(job)
        except Exception as error:
            code, message = failure(error)
            log.warning("request %s: %s", job.request.request_id, error)
            self._inbox.put(lambda: job.fail(code, message))
            return
        self._inbox.put(lambda: self._admit(job))

    def _load_parked(self) -> None:
        """Loads what waited for memory and has it now, one after the other: each one's pins count for the next."""
        while True:
            with self._changed:
                self._parked = [job for job in self._parked if not job.ended]
                job = next(filter(self._may_pin, self._parked), None)
                if job is None:
                    return
                self._parked.remove(job)
            self._load(job)

    def _load_and_fold(self, selection: Selection, future: Future[FoldReport]) -> None:
        try:
            factors = self._pin(selection)
        except Exception as error:
            self._answer_fold(future, error)
            return
        self._inbox.put(lambda: self._fold(selection, factors, future))

    def _pin(self, selection: Selection) -> tuple[AdapterFactors, ...]:
        """The factors of every adapter of a selection, pinned; none is if one of them cannot be."""
        pinned: list[AdapterFactors] = []
        try:
            for adapter in selection.adapters:
                pinned.append(self._registry.pin(adapter.digest))
        except BaseException:
            self._unpin(tuple(pinned))
            raise
        return tuple(pinned)

    def _unpin(self, factors: tuple[AdapterFactors, ...]) -> None:
        for adapter in factors:
            self._registry.unpin(adapter.digest)
        with self._changed:
            if self._parked and self._state in (EngineState.READY, EngineState.DRAINING):
                self._loaders.submit(self._load_parked)

    # --- on the model's thread --------------------------------------------------------------------

    def _run(self) -> None:
        compute_with(self._threads)
        self._begun.set()
        try:
            while self._state is not EngineState.STOPPED:
                self._take_in()
                self._expire()
                self._worker.step()
        except BaseException:
            log.exception("the engine's thread died")
            with self._changed:
                self._state = EngineState.DEAD
            self._fail_all("the engine failed; the server must be restarted")

    def _take_in(self) -> None:
        """Runs the commands that have come in; with nothing else to do, waits for one or for a deadline."""
        if not self._worker.has_work:
            with suppress(Empty):
                self._inbox.get(timeout=self._first_deadline())()
        self._run_commands()

    def _first_deadline(self) -> float | None:
        """Seconds until it; None if no request has one."""
        with self._changed:
            deadlines = [job.deadline for job in self._jobs.values() if job.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _run_commands(self) -> None:
        with suppress(Empty):
            while True:
                self._inbox.get_nowait()()

    def _admit(self, job: Job) -> None:
        if job.ended:
            self._release(job)  # cancelled while its adapters were loading
        else:
            self._worker.admit(job)

    def _cancel(self, request_id: str) -> None:
        with self._changed:
            job = self._jobs.get(request_id)
        if job is None:
            return
        try:
            job.cancel()
        except Exception as error:  # what is held back of its text may be what cannot be decoded
            log.exception("request %s could not be cancelled in order", request_id)
            job.fail(*failure(error))

    def _expire(self) -> None:
        now = time.monotonic()
        with self._changed:
            late = [job for job in self._jobs.values() if job.deadline is not None and job.deadline < now]
        for job in late:
            job.fail("request_timeout", f"the request did not finish within {job.request.timeout_s:g} s")

    def _fold(self, selection: Selection, factors: tuple[AdapterFactors, ...], future: Future[FoldReport]) -> None:
        try:
            self._answer_fold(future, self._worker.fold(selection, factors))
        except Exception as error:
            log.exception("folding failed")
            self._answer_fold(future, error)
        finally:
            self._unpin(factors)

    def _answer_fold(self, future: Future[FoldReport], answer: FoldReport | Exception) -> None:
        """Answers a future once, whichever thread comes first."""
        with self._changed:
            if future not in self._folds:
                return
            self._folds.remove(future)
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _ended(self, job: Job) -> None:
        """The job's terminal event has been sent."""
        with self._changed:
            del self._jobs[job.request.request_id]
            self._changed.notify_all()
        self._release(job)

    def _release(self, job: Job) -> None:
        with self._changed:  # a loader may be setting them
            factors, job.factors = job.factors, ()
        self._unpin(factors)

    def _fail_all(self, message: str) -> None:
        for job in self._left(message):
            job.fail("internal_error", message)

    def _give_up_all(self) -> None:
        """Has everyone told, whatever the other threads are in the middle of."""
        for job in self._left(_STOPPED):
            job.give_up("internal_error", _STOPPED)

    def _left(self, message: str) -> list[Job]:
        """The jobs that have not ended; the folds that have not are answered."""
        with self._changed:
            jobs, folds = list(self._jobs.values()), list(self._folds)
        for future in folds:
            self._answer_fold(future, EngineUnavailable(message))
        return jobs
