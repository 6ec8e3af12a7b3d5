"""The radix tree against a list of prefixes: what is found, what is counted, what goes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.engine.kv.backend import Blocks, joined
from service.engine.prefix_cache import BLOCK, PrefixCache, PrefixHit, common_blocks

BLOCK_BYTES = BLOCK * 8 * 2
Prefix = tuple[Any, tuple[int, ...]]  # owner and tokens, in whole blocks


def state(owner: object, tokens: Sequence[int]) -> Callable[[int, int], Blocks]:
    """As a runner reads it: keys are the tokens themselves, values say whose they are."""
    mark = sum(map(ord, str(owner)))

    def read(start: int, end: int) -> Blocks:
        keys = torch.tensor(tokens[start:end]).reshape(1, -1, 1)
        return [(keys, keys * 1000 + mark)]

    return read


def prompt(*blocks: int, rest: int = 0) -> list[int]:
    """Blocks of one repeated token each, and some tokens more."""
    return [token for block in blocks for token in [block] * BLOCK] + [99] * rest


def insert(cache: PrefixCache, owner: object, tokens: Sequence[int]) -> None:
    cache.insert(owner, tokens, state(owner, tokens))


def found(cache: PrefixCache, owner: object, tokens: Sequence[int]) -> int:
    """Tokens found; and their state is of these tokens and this owner."""
    expected = cache.matched_tokens(owner, tokens)
    hit = cache.match(owner, tokens)
    assert hit.tokens == expected
    check_state(hit, owner, tokens)
    hit.release()
    return expected


def check_state(hit: PrefixHit, owner: object, tokens: Sequence[int]) -> None:
    if hit.tokens:
        for mine, right in zip(joined(hit.pieces)[0], state(owner, tokens)(0, hit.tokens)[0], strict=True):
            assert torch.equal(mine, right)


class CacheAgainstAList(RuleBasedStateMachine):
    """The model: the prefixes kept, least recently used first, a leaf evicted before what it hangs on."""

    BUDGET = 6

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(self.BUDGET * BLOCK_BYTES)
        self.kept: list[Prefix] = []
        self.reading: list[tuple[PrefixHit, list[Prefix]]] = []

    owners = st.sampled_from(["one", "two"])
    prompts = st.builds(
        lambda blocks, rest: prompt(*blocks, rest=rest),
        st.lists(st.integers(0, 2), max_size=5),
        st.sampled_from([0, 1, 15]),
    )

    @rule(owner=owners, tokens=prompts)
    def insert(self, owner: str, tokens: list[int]) -> None:
        insert(self.cache, owner, tokens)
        self.use([(owner, tuple(tokens[:end])) for end in range(BLOCK, len(tokens) + 1, BLOCK)])
        self.evict(self.BUDGET)

    @rule(owner=owners, tokens=prompts, held=st.booleans())
    def match(self, owner: str, tokens: list[int], held: bool) -> None:
        path = self.path(owner, tokens)
        assert self.cache.matched_tokens(owner, tokens) == BLOCK * len(path)
        hit = self.cache.match(owner, tokens)
        assert hit.tokens == BLOCK * len(path)
        check_state(hit, owner, tokens)
        self.use(path)
        if held:
            self.reading.append((hit, path))
        else:
            hit.release()

    @rule()
    def release(self) -> None:
        if self.reading:
            self.reading.pop(0)[0].release()

    @rule(blocks=st.integers(0, 6))
    def shrink(self, blocks: int) -> None:
        self.cache.shrink_to(blocks * BLOCK_BYTES)
        self.evict(blocks)

    @invariant()
    def counts_what_it_keeps(self) -> None:
        assert self.cache.nbytes == len(self.kept) * BLOCK_BYTES
        assert len(self.cache._by_use) == len(self.kept)
        assert set(self.cache._roots) == {owner for owner, _ in self.kept}

    def path(self, owner: str, tokens: Sequence[int]) -> list[Prefix]:
        path = []
        for end in range(BLOCK, len(tokens), BLOCK):  # one token is left to run
            if (owner, tuple(tokens[:end])) not in self.kept:
                break
            path.append((owner, tuple(tokens[:end])))
        return path

    def use(self, path: list[Prefix]) -> None:
        for prefix in reversed(path):
            if prefix in self.kept:
                self.kept.remove(prefix)
            self.kept.append(prefix)

    def evict(self, blocks: int) -> None:
        read = [prefix for _, path in self.reading for prefix in path]
        for prefix in list(self.kept):
            if len(self.kept) <= blocks:
                return
            if prefix not in read and not any(self.hangs_on(other, prefix) for other in self.kept):
                self.kept.remove(prefix)

    @staticmethod
    def hangs_on(other: Prefix, prefix: Prefix) -> bool:
        return other != prefix and other[0] == prefix[0] and other[1][: len(prefix[1])] == prefix[1]


CacheAgainstAList.TestCase.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
TestCacheAgainstAList = CacheAgainstAList.TestCase


def test_finds_the_longest_beginning_in_whole_blocks() -> None:
    cache = PrefixCache(1 << 20)
    insert(cache, "a", prompt(1, 2, 3, rest=5))
    assert cache.nbytes == 3 * BLOCK_BYTES
    assert found(cache, "a", prompt(1, 2, 3, rest=1)) == 3 * BLOCK
    assert found(cache, "a", prompt(1, 2, 4, 3)) == 2 * BLOCK, "a partial hit"
    assert found(cache, "a", prompt(1, 2, rest=7)) == 2 * BLOCK
    assert found(cache, "a", prompt(2, 3, rest=1)) == 0
    assert found(cache, "a", [*prompt(1)[:-1], 5]) == 0, "a block is found whole or not at all"


def test_leaves_a_token_to_run() -> None:
    cache = PrefixCache(1 << 20)
    insert(cache, "a", prompt(1, 2))
    assert found(cache, "a", prompt(1, 2)) == BLOCK
    assert found(cache, "a", prompt(1, 2, rest=1)) == 2 * BLOCK
    assert found(cache, "a", []) == 0


def test_owners_never_share() -> None:
    cache = PrefixCache(1 << 20)
    tokens = prompt(1, 2, rest=1)
    owners = [("", (("d", 1.0),)), ("", (("d", 0.5),)), ("tenant", (("d", 1.0),)), ("", ())]
    insert(cache, owners[0], tokens)
    assert [found(cache, owner, tokens) for owner in owners] == [32, 0, 0, 0]
    for owner in owners:
        insert(cache, owner, tokens)
    assert cache.nbytes == 8 * BLOCK_BYTES
    assert [found(cache, owner, tokens) for owner in owners] == [32] * 4


def test_reads_only_what_it_does_not_have() -> None:
    cache = PrefixCache(1 << 20)
    insert(cache, "a", prompt(1, 2))
    reads = []

    def read(start: int, end: int) -> Blocks:
        reads.append((start, end))
        return state("a", prompt(1, 2, 3))(start, end)

    cache.insert("a", prompt(1, 2, 3, rest=3), read)
    assert reads == [(32, 48)]


def test_the_least_recently_used_leaf_goes_first() -> None:
    cache = PrefixCache(4 * BLOCK_BYTES)
    insert(cache, "a", prompt(1, 2, 3))
    insert(cache, "a", prompt(1, 4))
    assert found(cache, "a", prompt(1, 4, rest=1)) == 32
    insert(cache, "a", prompt(5))
    assert found(cache, "a", prompt(1, 2, 3, rest=1)) == 32, "its last block went, not what others hang on"
    assert found(cache, "a", prompt(1, 4, rest=1)) == 32
    assert found(cache, "a", prompt(5, rest=1)) == 16
    assert cache.evicted_blocks == 1


def test_what_is_read_stays() -> None:
    cache = PrefixCache(2 * BLOCK_BYTES)
    insert(cache, "a", prompt(1, 2))
    hit = cache.match("a", prompt(1, 2, rest=1))
    cache.shrink_to(0)
    assert cache.nbytes == 2 * BLOCK_BYTES
    insert(cache, "a", prompt(3))
    assert cache.nbytes == 2 * BLOCK_BYTES, "what cannot be kept beside it is not"
    check_state(hit, "a", prompt(1, 2))
    hit.release()
    cache.shrink_to(0)
    assert cache.nbytes == 0


def test_a_prompt_larger_than_the_budget_keeps_its_beginning() -> None:
    cache = PrefixCache(2 * BLOCK_BYTES)
    insert(cache, "a", prompt(1, 2, 3, 4))
    assert found(cache, "a", prompt(1, 2, 3, 4, rest=1)) == 32
    assert cache.nbytes == 2 * BLOCK_BYTES


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_nothing_is_left_of_owners_without_blocks(budget: int) -> None:
    """Each blend is an owner of its own: what short prompts or evicted ones left behind would add up."""
    cache = PrefixCache(budget)
    for weight in range(50):
        insert(cache, ("tenant", weight), [1] * (BLOCK - 1))
        insert(cache, ("tenant", weight), prompt(1, 2))
    cache.shrink_to(0)
    assert cache.nbytes == 0
    assert not cache._roots
    assert not cache._by_use


def test_common_blocks() -> None:
    assert common_blocks(prompt(1, 2, rest=3), prompt(1, 2, 3)) == 32
    assert common_blocks(prompt(1, 2), prompt(1)) == 16
    assert common_blocks([*prompt(1)[:-1], 9], prompt(1, 2)) == 0
    assert common_blocks([], prompt(1)) == 0
