"""Which replica a request goes to, decided from nothing but names and numbers.

A request with adapters goes to the replica that their digests choose (rendezvous hashing: each pair of a key and a
replica has a score, and the highest wins), so that an adapter is loaded and composed on one replica and not on all.
When a replica comes or goes, only those keys move that it wins or had won: one in n.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Mapping, Sequence


def affinity_key(digests: Iterable[str]) -> str | None:
    """What requests with these adapters have in common, whatever their order and weights; None of none."""
    return "+".join(sorted(set(digests))) or None


def rendezvous(key: str, replicas: Iterable[str]) -> list[str]:
    """The replicas, the key's own first; the same order whoever asks."""
    return sorted(replicas, key=lambda replica: (_score(key, replica), replica), reverse=True)


def _score(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest()


def with_room(loads: Mapping[str, int | None], limit: int) -> list[str]:
    """The replicas that may take one more. None: nobody knows, so it is to be tried."""
    return [replica for replica, load in loads.items() if load is None or load < limit]


def ranks(key: str | None, replicas: Sequence[str], pick: random.Random, busy: Collection[str] = ()) -> list[list[str]]:
    """Groups of replicas to try one after the other; within a group, the one with the least to do.

    With a key: one by one, its own first, and those that are `busy`, where it would wait, behind the others: a compose
    elsewhere takes less than a queue does. Without: two at random, which is nearly as good as the best of all and does
    not send everybody to the same one; then the others.
    """
    if key is not None:
        order = rendezvous(key, replicas)
        return [[replica] for replica in sorted(order, key=lambda replica: replica in busy)]
    shuffled = pick.sample(replicas, len(replicas))
    return [group for group in (shuffled[:2], shuffled[2:]) if group]
