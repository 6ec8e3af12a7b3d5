"""The followers as the leader sees them: started, told what to do, listened to, watched, and ended."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

from service.engine.fatal import ShardsLost
from service.engine.shards import messages
from service.engine.shards.follower import Orders, main
from service.engine.shards.group import Group
from service.engine.shards.plan import Shard

log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0  # for a step's others; between steps nobody waits in the group
_HURRIED_S = 5.0
_LAST_WORDS_S = 10.0


class Team:
    """The processes that hold the other parts of a model. One thread at a time leads; any may close it."""

    def __init__(
        self,
        model: str,
        size: int,
        *,
        dtype: str,
        device: str,
        pack_weights: bool,
        threads: int,
        prepare: Callable[[], None] = logging.basicConfig,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        """Starts the followers, which begin to load; `join` waits for them. Each calls `prepare` first."""
        self.shard = Shard(0, size)
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="vblora-shards-")
        self._group = Group(self._folder.name, timeout_s)
        self._closing = self._listening = False
        self._lost: str | None = None
        self._on_lost: Callable[[ShardsLost], None] | None = None
        self._lock = threading.Lock()
        spawning = multiprocessing.get_context("spawn")
        self._processes: list[SpawnProcess] = []
        self._connections = []
        for rank in range(1, size):
            ours, theirs = spawning.Pipe()
            orders = Orders(model, dtype, device, pack_weights, Shard(rank, size), self._group, threads, prepare)
            process = spawning.Process(target=main, args=(orders, theirs), name=f"vblora-shard-{rank}", daemon=True)
            process.start()
            theirs.close()  # so that its end is the end of the pipe
            self._processes.append(process)
            self._connections.append(ours)
        threading.Thread(target=self._watch, name="vblora-shards", daemon=True).start()

    @property
    def processes(self) -> list[int]:
        """The followers' process ids."""
        return [process.pid for process in self._processes if process.pid is not None]

    def join(self, device: torch.device) -> None:
        """Waits until everyone has loaded a part, and forms the group. Raises ShardsLost."""
        self.answers(patient=True)
        self.tell(messages.Join())
        self._group.join(self.shard, device)
        self._listening = True

    def on_lost(self, tell: Callable[[ShardsLost], None]) -> None:
        """Has a follower's end told, from a thread of its own, once; also one that has been already."""
        with self._lock:
            self._on_lost = tell
            lost = self._lost
        if lost is not None:
            tell(ShardsLost(lost))

    def tell(self, message: object) -> None:
        """Sends a message to every follower. Raises ShardsLost."""
        for rank, connection in enumerate(self._connections, 1):
            # One that stands still takes nothing; a pipe that is full would hold the engine for ever.
            limit = threading.Timer(self._timeout_s, self._processes[rank - 1].kill)
            limit.start()
            try:
                messages.send(connection, message)
            except OSError as error:
                raise self._gone(rank) from error
            finally:
                limit.cancel()

    def receive(self) -> list[Any]:
        """A message of every follower, however long that takes. Raises ShardsLost."""
        return [self._receive(rank, None) for rank in range(1, self.shard.size)]

    def answers(self, *, hurried: bool = False, patient: bool = False) -> list[str | None]:
        """Of every follower, why what it was told last failed, or None. Raises ShardsLost."""
        timeout_s = None if patient else _HURRIED_S if hurried else self._timeout_s
        answers = [self._receive(rank, timeout_s) for rank in range(1, self.shard.size)]
        assert all(isinstance(answer, messages.Done) for answer in answers)
        return [answer.failure for answer in answers]

    def close(self) -> None:
        """Ends the followers. Calling it again does nothing."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            if self._listening:
                process.join(_LAST_WORDS_S)
                if process.is_alive():
                    log.warning("%s did not end by itself: it is killed", process.name)
            process.kill()  # one that still loads, or that is lost, does not listen
            process.join()
        self._group.leave()
        self._folder.cleanup()

    def _receive(self, rank: int, timeout_s: float | None) -> Any:
        connection = self._connections[rank - 1]
        try:
            if not connection.poll(timeout_s):
                self._listening = False
                raise ShardsLost(f"part {rank} of the model did not answer within {timeout_s:g} s")
            return messages.receive(connection)
        except (EOFError, OSError) as error:
            raise self._gone(rank) from error

    def _gone(self, rank: int) -> ShardsLost:
        self._listening = False
        return ShardsLost(f"the process with part {rank} of the model has ended")

    def _watch(self) -> None:
        """Waits for the first follower that ends. Whoever waits for it in the group is let go."""
        ended = wait([process.sentinel for process in self._processes])
        with self._lock:
            if self._closing:
                return
            names = [process.name for process in self._processes if process.sentinel in ended]
            self._lost = f"{', '.join(names)}, which held a part of the model, has ended"
            tell = self._on_lost
        log.error("%s: no answer can be computed any more", self._lost)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()  # else it would wait on the device for the one that is gone
        if tell is not None:
            tell(ShardsLost(self._lost))
