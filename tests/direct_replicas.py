"""Replicas in the test's own process, without Ray: what is sent to them is pickled, as it would be."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from service.api.deps import ServerState
from service.api.stats import show_stats
from service.cluster.messages import Forwarded, Message
from service.cluster.policy import rendezvous
from service.cluster.replica import Replica
from service.cluster.seam import ReplicaLost, ReplicasFull


async def _load(piece: Any) -> bytes:
    return piece if isinstance(piece, bytes) else _KEPT.pop(piece)


_KEPT: dict[int, bytes] = {}


class DirectReplicas:
    """One replica for each state. `lose` has the replica that is chosen next be lost after so many batches;
    `full` refuses everything.
    """

    def __init__(self, states: Sequence[ServerState]) -> None:
        self.states = {str(i): state for i, state in enumerate(states)}
        self._replicas = {name: Replica(state, _load) for name, state in self.states.items()}
        self.asked: list[tuple[str, Forwarded]] = []
        self.lose: list[int] = []
        self.full = False
        self.between: Callable[[], Any] | None = None

    async def answer(self, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        if self.full:
            raise ReplicasFull
        name = rendezvous(request.affinity or "", self._replicas)[0]
        self.asked.append((name, request))
        batches = self.lose.pop(0) if self.lose else None
        async with aclosing(self._replicas[name].answer(pickle.loads(pickle.dumps(request)))) as answers:
            if batches == 0:
                raise ReplicaLost
            async for batch in answers:
                yield pickle.loads(pickle.dumps(batch))
                if batches is not None and (batches := batches - 1) == 0:
                    raise ReplicaLost

    async def keep(self, piece: bytes) -> Any:
        await asyncio.sleep(0)
        _KEPT[key := len(_KEPT) + 1000 * id(piece)] = piece
        return key

    async def ask_all(self, question: str, *arguments: Any) -> Mapping[str, Any]:
        if question == "metrics":
            return {name: state.metrics.render(*arguments)[0].decode() for name, state in self.states.items()}
        return {name: show_stats(state, *arguments) for name, state in self.states.items()}

    def count(self) -> int:
        return len(self._replicas)
