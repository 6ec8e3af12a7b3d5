"""The replicas of a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from service.cluster.messages import Facts, Forwarded, Message
from service.cluster.routing import ROUTERS
from service.cluster.seam import ReplicaLost

log = logging.getLogger(__name__)

_ASKED_S = 5.0
_GONE = (RayActorError, WorkerCrashedError, DeploymentUnavailableError, ReplicaUnavailableError)


class RayReplicas:
    """What an ingress asks of `service.ray_app`'s EngineReplica."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._answering = handle.options(method_name="answer", stream=True)

    async def facts(self) -> Facts:
        """Waits until there is a replica."""
        facts: Facts = await self._handle.facts.remote()
        return facts

    async def answer(self, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        response = self._answering.remote(request)
        ended = False
        try:
            async for batch in response:
                yield batch
            ended = True
        except _GONE as error:
            ended = True
            raise ReplicaLost from error
        except RayTaskError as error:
            ended = True
            if isinstance(error.cause, _GONE):
                raise ReplicaLost from error
            raise
        finally:
            if not ended:
                response.cancel()

    async def keep(self, piece: bytes) -> Any:
        return await asyncio.to_thread(ray.put, piece)

    async def ask_all(self, question: str, *arguments: Any) -> Mapping[str, Any]:
        """Each answers (its name, the answer)."""
        if self.count() == 0:
            return {}
        try:
            # Ray's own way to wait for the answers drops all of them when one does not come.
            asked = await self._handle.broadcast("ask", question, *arguments)._fetch_replica_results_async()
        except _GONE:
            return {}
        answers = [asyncio.ensure_future(each.get_async()) for each in asked]
        said, silent = await asyncio.wait(answers, timeout=_ASKED_S)
        for answer in silent:
            answer.cancel()
        if silent:
            log.warning("%d replicas did not say their %s within %g seconds", len(silent), question, _ASKED_S)
        return dict(answer.result() for answer in said if answer.exception() is None)

    def count(self) -> int:
        return max((len(router.replica_names) for router in list(ROUTERS)), default=0)
