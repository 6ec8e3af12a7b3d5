"""The policy as Ray Serve's request router: `request_router_class="service.cluster.router:AffinityRouter"`.

It runs in the ingress's process, on a thread of Ray's. Ray sends this module as it is: what there may be only once in a
process is in `routing`.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from service.cluster import routing
from service.cluster.messages import Forwarded
from service.cluster.policy import ranks, rendezvous, with_room
from service.cluster.seam import ReplicasFull


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """Sends a `Forwarded` where its adapters are; when no replica has room, refuses it instead of holding it.

    Of a replica's `max_ongoing_requests`, `reserve` are for what takes no place in an engine: looking, uploading.
    Beyond `places` requests at a replica, the next one waits there.
    """

    def initialize_state(self, reserve: int = 0, places: int | None = None) -> None:
        self._reserve = reserve
        self._places = places
        self._pick = random.Random()
        routing.ROUTERS.add(self)

    @property
    def replica_names(self) -> list[str]:
        return [replica.replica_id.unique_id for replica in list(self._replicas.values())]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        request = _forwarded(pending_request)
        reserve = self._reserve if request is None or request.generates else 0
        free = self._free(by_name, reserve)
        if not free and request is not None:
            # Others may have been served by other ingresses, which this one is not told of.
            await self._probe_queue_lens(candidate_replicas, 0)
            free = self._free(by_name, reserve)
            if not free:
                self._refuse(pending_request)
                return []
        names = free or list(by_name)
        groups = ranks(None if request is None else request.affinity, names, self._pick, self._busy(by_name))
        return [[by_name[name] for name in group] for group in groups]

    def _loads(self, by_name: dict[str, RunningReplica]) -> dict[str, int | None]:
        return {name: self._replica_queue_len_cache.get(each.replica_id) for name, each in by_name.items()}

    def _busy(self, by_name: dict[str, RunningReplica]) -> set[str]:
        if self._places is None:
            return set()
        loads = self._loads(by_name)
        return set(loads).difference(with_room(loads, self._places))

    def _free(self, by_name: dict[str, RunningReplica], reserve: int) -> list[str]:
        loads = self._loads(by_name)
        most = min((each.max_ongoing_requests for each in by_name.values()), default=0)
        return with_room(loads, max(1, most - reserve))

    def _refuse(self, pending_request: PendingRequest) -> None:
        if not pending_request.future.done():
            routing.COUNTS[routing.Routed.REFUSED] += 1
            pending_request.future.set_exception(ReplicasFull())
            self._remove_pending_request_from_indices(pending_request)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        request = _forwarded(pending_request)
        if request is None or not request.generates:
            return
        if request.affinity is None:
            routing.COUNTS[routing.Routed.ANY] += 1
        else:
            at_home = rendezvous(request.affinity, self.replica_names)[:1] == [replica_id.unique_id]
            routing.COUNTS[routing.Routed.HOME if at_home else routing.Routed.SPILLED] += 1


def _forwarded(pending_request: PendingRequest) -> Forwarded | None:
    first: Any = pending_request.args[0] if pending_request.args else None
    return first if isinstance(first, Forwarded) else None
