"""The replicas as an ingress sees them: what stands behind it may be Ray, or a test's own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

from service.cluster.messages import Forwarded, Message


class ReplicasFull(Exception):
    """Every replica has as much to do as it may have."""


class ReplicaLost(Exception):
    """The replica that was answering is gone."""


class Replicas(Protocol):
    """The replicas as an ingress sees them."""

    def answer(self, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        """Batches of messages; closing it tells the replica that the client has left.

        Raises ReplicasFull before the first, ReplicaLost at any point.
        """
        ...

    async def keep(self, piece: bytes) -> Any:
        """Puts a piece of a body where a replica can fetch it; what stands for it."""
        ...

    async def ask_all(self, question: str, *arguments: Any) -> Mapping[str, Any]:
        """What each replica that can be reached answers, by what it is called in metrics."""
        ...

    def count(self) -> int:
        """Those that requests can go to."""
        ...
