"""What travels between the ingress and a replica, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.api.deps import ApiSettings
from service.api.keys import ApiKey


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A request that has passed the ingress's guards.

    `scope` is what of its ASGI scope can travel. `body` holds its pieces, or what stands for them in Ray's object
    store. `generates`: it takes a place in an engine, where `affinity` has it go. `seen` is the ingress and how many
    changes of adapters it has let through: the replica is to know of them all.
    """

    scope: Mapping[str, Any]
    request_id: str
    key: ApiKey | None
    body: tuple[Any, ...]
    affinity: str | None
    generates: bool
    seen: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer; pieces of its body, as bytes, follow."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of an answer that is whole, and what the access log and the metrics are to know of it."""

    route: str
    error_code: str | None
    fields: Mapping[str, Any]


Message = Head | bytes | Tail


@dataclass(frozen=True, slots=True)
class Facts:
    """What an ingress needs to know of the replicas, which are all alike."""

    settings: ApiSettings
    base: str
