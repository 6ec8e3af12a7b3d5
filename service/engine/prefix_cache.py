"""Keys and values of prompts already run, for requests that begin alike: a radix tree over blocks of 16 tokens.

A key-value state depends on the tokens and on what ran them, so trees are kept apart by tenant and selection: with a
key of tokens alone, one adapter would answer with another's state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from service.engine.kv.backend import Blocks

BLOCK = 16

Read = Callable[[int, int], Blocks]  # (start, end) → a copy of the state of these tokens


@dataclass(slots=True, eq=False)
class _Node:
    """One block of tokens after its parent's. `key` is its place among its siblings."""

    parent: _Node | None
    key: Hashable
    blocks: Blocks
    children: dict[Hashable, _Node] = field(default_factory=dict)
    readers: int = 0

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.blocks)


class PrefixHit:
    """A cached beginning of a prompt: `tokens` of it, whose state is in `pieces`. Held in the cache until `release`."""

    def __init__(self, nodes: Sequence[_Node]) -> None:
        self._nodes = nodes
        for node in nodes:
            node.readers += 1

    @property
    def tokens(self) -> int:
        return BLOCK * len(self._nodes)

    @property
    def pieces(self) -> list[Blocks]:
        """The state of its tokens, block by block, as it was read."""
        return [node.blocks for node in self._nodes]

    def release(self) -> None:
        for node in self._nodes:
            node.readers -= 1
        self._nodes = ()


class PrefixCache:
    """At most `budget_bytes` of state, of which the least recently used is evicted, never what is being read."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._roots: dict[Hashable, _Node] = {}
        # Least recently used first. A use moves the deepest node first and its ancestors after it, so that a node is
        # never older than its children, and the oldest one is always a leaf.
        self._by_use: OrderedDict[int, _Node] = OrderedDict()
        self.nbytes = 0
        self.evicted_blocks = 0

    def match(self, owner: Hashable, tokens: Sequence[int]) -> PrefixHit:
        """The longest cached beginning of a prompt, in whole blocks, that leaves at least one token to run."""
        nodes = self._path(owner, tokens, (len(tokens) - 1) // BLOCK)
        self._touch(nodes)
        return PrefixHit(nodes)

    def matched_tokens(self, owner: Hashable, tokens: Sequence[int]) -> int:
        """How many tokens `match` would find, without counting as a use."""
        return BLOCK * len(self._path(owner, tokens, (len(tokens) - 1) // BLOCK))

    def insert(self, owner: Hashable, tokens: Sequence[int], read: Read) -> None:
        """Keeps the state of a prompt's whole blocks, reading those that are not kept yet."""
        nodes = self._path(owner, tokens, len(tokens) // BLOCK)
        try:
            for start in range(BLOCK * len(nodes), BLOCK * (len(tokens) // BLOCK), BLOCK):
                blocks = read(start, start + BLOCK)
                parent = nodes[-1] if nodes else self._roots.setdefault(owner, _Node(None, owner, []))
                node = _Node(parent, tuple(tokens[start : start + BLOCK]), blocks)
                parent.children[node.key] = node
                nodes.append(node)
                self.nbytes += node.nbytes
        finally:
            self._touch(nodes)
            self.shrink_to(self._budget)

    def shrink_to(self, nbytes: int) -> None:
        """Evicts until at most this much is kept, or only what is being read."""
        for identity, node in list(self._by_use.items()):
            if self.nbytes <= nbytes:
                return
            if not node.readers and not node.children:
                del self._by_use[identity]
                self._remove(node)
                self.evicted_blocks += 1

    def _path(self, owner: Hashable, tokens: Sequence[int], most: int) -> list[_Node]:
        nodes: list[_Node] = []
        node = self._roots.get(owner)
        while node is not None and len(nodes) < most:
            start = BLOCK * len(nodes)
            node = node.children.get(tuple(tokens[start : start + BLOCK]))
            if node is not None:
                nodes.append(node)
        return nodes

    def _touch(self, nodes: Sequence[_Node]) -> None:
        for node in reversed(nodes):
            self._by_use[id(node)] = node
            self._by_use.move_to_end(id(node))

    def _remove(self, node: _Node) -> None:
        self.nbytes -= node.nbytes
        assert node.parent is not None
        del node.parent.children[node.key]
        root = node.parent
        if root.parent is None and not root.children:
            del self._roots[root.key]


def common_blocks(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens in whole blocks that two prompts begin with alike."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length // BLOCK * BLOCK
