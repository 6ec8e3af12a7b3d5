"""A process that holds a part of the model and does what the leader does.

It ends when the leader's end of the pipe closes, or the leader itself is gone; no signal that a terminal or a service
manager sends to the whole group ends it before.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from adapters.composing import composed
from adapters.factors import AdapterFactors, FactorStack
from adapters.low_rank import LowRankBatch
from adapters.shared_banks import SharedBanks
from service.engine.base_model import LoadedBase, load_base
from service.engine.kv.backend import Blocks
from service.engine.model_runner import TransformersRunner
from service.engine.self_test import choose_runner
from service.engine.shards import messages
from service.engine.shards.group import Group
from service.engine.shards.plan import Shard
from service.engine.threads import compute_with

log = logging.getLogger(__name__)

_MIXES_KEPT = 4


@dataclass(frozen=True, slots=True)
class Orders:
    """What a follower is started with. Of the engine: what its runner is chosen and its memory reserved by."""

    model: str
    dtype: str
    device: str
    pack_weights: bool
    shard: Shard
    group: Group
    threads: int
    prepare: Callable[[], None]  # its logs


def main(orders: Orders, connection: Connection) -> None:
    """The process. Ends without a word when the leader is done with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_leader, daemon=True).start()
    orders.prepare()
    disable_progress_bar()
    compute_with(orders.threads)
    try:
        _serve(orders, connection)
    except (EOFError, ConnectionError):
        pass  # the leader has ended
    except BaseException:
        log.exception("part %d of the model failed", orders.shard.rank)
        os._exit(1)
    os._exit(0)  # without the group's own farewell, which may wait for others


def _end_with_the_leader() -> None:
    leader = multiprocessing.parent_process()
    assert leader is not None
    leader.join()
    os._exit(1)


def _serve(orders: Orders, connection: Connection) -> None:
    base = load_base(
        orders.model,
        dtype=orders.dtype,
        device=orders.device,
        pack_weights=orders.pack_weights,
        shard=orders.shard,
    )
    messages.send(connection, messages.Done())
    message = messages.receive(connection)
    assert isinstance(message, messages.Join)
    orders.group.join(orders.shard, base.device)
    choose: messages.Choose = messages.receive(connection)
    runner, batches = choose_runner(base.adapted, base.device, base.vocabulary, choose.kv_memory, choose.max_context)
    messages.send(connection, messages.Chosen(runner.kv.name, batches))
    reserve: messages.Reserve = messages.receive(connection)
    runner.kv.reserve(reserve.rows, reserve.longest)
    follower = Follower(base, runner)
    while True:
        answer = follower.follow(messages.receive(connection))
        if answer is not None:
            messages.send(connection, answer)


class Follower:
    """Does what messages say on its own part."""

    def __init__(self, base: LoadedBase, runner: TransformersRunner) -> None:
        self._base = base
        self._runner = runner
        self._banks = SharedBanks(base.device)
        self._stack = FactorStack(base.adapted.siblings)
        self._held: dict[str, AdapterFactors] = {}
        self._blocks: dict[int, Blocks] = {}
        self._mixes: OrderedDict[object, LowRankBatch] = OrderedDict()

    def follow(self, message: Any) -> messages.Done | None:
        """Does it. Only steps are answered, and only they may fail without ending the process."""
        match message:
            case messages.Extend():
                return self._extend(message)
            case messages.Add(rows):
                self._runner.add(rows)
            case messages.Keep(rows):
                self._runner.keep(rows)
            case messages.Hold(digest, checkpoint):
                shared = self._banks.shared(checkpoint)
                self._held[digest] = composed(digest, shared, self._base.adapted, self._banks, self._base.device)
            case messages.Drop(digests):
                self._drop(digests)
            case messages.Read(number, row, start, end):
                self._blocks[number] = self._runner.read(row, start, end)
            case messages.Write(row, numbers):
                self._runner.write(row, *(self._blocks[number] for number in numbers))
            case messages.Forget(numbers):
                for number in numbers:
                    del self._blocks[number]
            case _:
                raise AssertionError(message)
        return None

    def _extend(self, step: messages.Extend) -> messages.Done:
        try:
            mix = None if step.mix is None else self._mix(step.mix)
            self._runner.extend(step.rows, step.tokens, mix, every_position=step.every_position)
        except Exception as error:
            log.warning("a step failed: %s", error)
            return messages.Done(f"{type(error).__name__}: {error}")
        return messages.Done()

    def _mix(self, mix: messages.Mix) -> LowRankBatch:
        """Kept from step to step, as the leader keeps its own."""
        self._stack.hold(self._held[digest] for digest in mix.stacked if digest in self._held)
        key = self._stack.generation, mix.digests, mix.weights
        if key not in self._mixes:
            weights = torch.tensor(mix.weights)
            self._mixes[key] = LowRankBatch([self._held[digest] for digest in mix.digests], weights, self._stack)
        self._mixes.move_to_end(key)
        while len(self._mixes) > _MIXES_KEPT:
            self._mixes.popitem(last=False)
        return self._mixes[key]

    def _drop(self, digests: tuple[str, ...]) -> None:
        self._mixes.clear()
        for digest in digests:
            del self._held[digest]
