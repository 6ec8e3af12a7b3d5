"""Where requests go, in numbers."""

from __future__ import annotations

import random
from collections import Counter

from service.cluster.policy import affinity_key, ranks, rendezvous, with_room

REPLICAS = [f"replica-{i}" for i in range(5)]
KEYS = [f"sha256:{i:064x}" for i in range(2000)]


def homes(replicas: list[str]) -> dict[str, str]:
    return {key: rendezvous(key, replicas)[0] for key in KEYS}


def test_the_same_order_whoever_asks() -> None:
    shuffled = random.Random(0).sample(REPLICAS, len(REPLICAS))
    assert all(rendezvous(key, REPLICAS) == rendezvous(key, shuffled) for key in KEYS[:50])


def test_every_replica_has_its_share() -> None:
    counts = Counter(homes(REPLICAS).values())
    assert set(counts) == set(REPLICAS)
    assert all(0.8 * 400 < count < 1.2 * 400 for count in counts.values())


def test_of_a_replica_that_goes_only_its_own_move() -> None:
    before, after = homes(REPLICAS), homes(REPLICAS[:-1])
    assert all(after[key] == home for key, home in before.items() if home != REPLICAS[-1])
    moved = Counter(after[key] for key, home in before.items() if home == REPLICAS[-1])
    assert set(moved) == set(REPLICAS[:-1]), "to all the others, not to one"


def test_a_replica_that_comes_takes_one_in_n() -> None:
    before, after = homes(REPLICAS), homes([*REPLICAS, "new"])
    moved = [key for key in KEYS if before[key] != after[key]]
    assert all(after[key] == "new" for key in moved)
    assert 0.75 / 6 < len(moved) / len(KEYS) < 1.25 / 6


def test_the_key_is_of_the_files_alone() -> None:
    assert affinity_key(["b", "a", "b"]) == affinity_key(["a", "b"]) != affinity_key(["a"])
    assert affinity_key([]) is None


def test_with_adapters_one_by_one_in_rendezvous_order() -> None:
    groups = ranks(KEYS[0], REPLICAS, random.Random(0))
    assert groups == [[name] for name in rendezvous(KEYS[0], REPLICAS)]


def test_where_it_would_wait_it_goes_last() -> None:
    order = rendezvous(KEYS[0], REPLICAS)
    busy = {order[0], order[2]}
    groups = ranks(KEYS[0], REPLICAS, random.Random(0), busy)
    assert groups == [[name] for name in (order[1], order[3], order[4], order[0], order[2])]
    assert ranks(KEYS[0], REPLICAS, random.Random(0), set(REPLICAS)) == [[name] for name in order]


def test_a_full_replica_spills_to_the_next() -> None:
    first, second, *_ = rendezvous(KEYS[0], REPLICAS)
    loads: dict[str, int | None] = {**dict.fromkeys(REPLICAS, 0), first: 4}
    assert ranks(KEYS[0], with_room(loads, 4), random.Random(0))[0] == [second]
    assert ranks(KEYS[0], with_room(loads, 5), random.Random(0))[0] == [first]


def test_room() -> None:
    assert with_room({"a": 3, "b": 2, "c": None}, 3) == ["b", "c"]
    assert with_room({"a": 3, "b": 4}, 3) == []


def test_without_adapters_two_at_random_then_the_rest() -> None:
    pick = random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(1000):
        pair, rest = ranks(None, REPLICAS, pick)
        assert len(pair) == 2
        assert sorted([*pair, *rest]) == sorted(REPLICAS)
        seen.update(pair)
    assert all(300 < count < 500 for count in seen.values())
    assert ranks(None, ["only"], pick) == [["only"]]
