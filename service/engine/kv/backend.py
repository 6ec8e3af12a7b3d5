"""What the runner asks of a key-value backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache

# One row's keys and values of a run of tokens, by layer: ([heads, tokens, features], the same).
Blocks = list[tuple[Tensor, Tensor]]


def joined(pieces: Sequence[Blocks]) -> Blocks:
    """Runs of one row's tokens that follow each other, as one."""
    if len(pieces) == 1:
        return pieces[0]
    by_layer = zip(*pieces, strict=True)
    return [(torch.cat([k for k, _ in layer], dim=1), torch.cat([v for _, v in layer], dim=1)) for layer in by_layer]


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """What one forward is given besides its token ids, which are padded on the left.

    `mask` is None (plain causal attention), [rows, length] with 1 for tokens, or [rows, 1, queries, length], additive.
    `positions` [rows, queries].
    """

    cache: Cache
    mask: Tensor | None
    positions: Tensor


class KVBackend(Protocol):
    """The state of the running rows, numbered from 0 in the order in which they were added.

    A forward is `begin` → the model → `commit`; without the commit nothing has happened, so that it can be tried again.
    `ragged`: the rows of one forward may take different counts of tokens.
    """

    name: str
    ragged: bool
    budget_bytes: int

    @property
    def rows(self) -> int: ...

    @property
    def used_bytes(self) -> int:
        """What the tokens of the rows take, without what is held ready for more of them. From any thread."""
        ...

    def spare(self, lengths: Sequence[int]) -> int:
        """Bytes of the budget left beside rows grown to these lengths; negative if they do not fit. From any thread."""
        ...

    def reserve(self, rows: int, longest: int) -> None:
        """Makes room ahead, where that saves copying, for so many rows of up to `longest` tokens."""
        ...

    def add(self, rows: int) -> None:
        """Adds empty rows after those there."""
        ...

    def begin(self, rows: Sequence[int], counts: Sequence[int]) -> StepInputs:
        """Prepares a forward over some rows, each by `counts` more tokens."""
        ...

    def commit(self) -> None:
        """The forward begun last has run: its tokens are in."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order, and drops the others."""
        ...

    def read(self, row: int, start: int, end: int) -> Blocks:
        """A copy of a row's state for its tokens from `start` to `end`."""
        ...

    def write(self, row: int, blocks: Blocks) -> None:
        """Appends state read earlier to a row."""
        ...
