"""The two products of a batch's low-rank part, `h = A x` and `y += B h`, for every mix of adapters.

- `Stacked`: all rows by all ranks in use, weighed by zero where a row does not use one. Two products whatever the mix;
  the best there is for few adapters, and wasteful for many: of K adapters a row needs one.
- `Blocked`: the ranks cut into blocks that are one adapter's each, and every block multiplied by the rows that use it.
  Reads each factor once, computes nothing twice, and costs a gather of rows and the adding up of what they got.

`products_for` chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Measured on CPUs, at ranks of 4: below so many multiplications per feature the stacked products are as fast,
# and a block's product costs this many times as much as the same share of a stacked one.
_FEW = 512
_OVERHEAD = 4


class Products(Protocol):
    """`shrink` and `expand` for flat rows: [rows · tokens, features], each row's tokens side by side, float32."""

    def shrink(self, a: Tensor, layers: int, x: Tensor) -> Sequence[Tensor]:
        """What `expand` takes, one for each layer. `a` [ranks · layers, in_features] of layers that read `x`."""
        ...

    def expand(self, output: Tensor, h: Tensor, b_t: Tensor) -> None:
        """Adds to `output` [rows · tokens, out_features], in place. `b_t` [ranks, out_features]."""
        ...


class Stacked:
    """`by_rank` [ranks, rows]: each row's weight of each rank; [ranks, 1] for all rows. None: 1 throughout."""

    def __init__(self, by_rank: Tensor | None) -> None:
        self._by_rank = by_rank
        self._by_token: Tensor | None = None

    def shrink(self, a: Tensor, layers: int, x: Tensor) -> Sequence[Tensor]:
        h = torch.mm(a, x.t()).view(-1, layers, len(x))  # [ranks, layers, rows · tokens]
        if self._by_rank is not None:
            h.mul_(self._for_tokens(self._by_rank, len(x), x.device).unsqueeze(1))
        return h.permute(1, 2, 0).unbind(0)

    def expand(self, output: Tensor, h: Tensor, b_t: Tensor) -> None:
        output.addmm_(h, b_t)

    def _for_tokens(self, by_rank: Tensor, tokens: int, device: torch.device) -> Tensor:
        """Each token's weight of each rank, [ranks, tokens], or [ranks, 1] for all."""
        if self._by_token is None or self._by_token.shape[1] not in (1, tokens):
            rows = by_rank.shape[1]
            by_row = by_rank.to(device, torch.float32)
            self._by_token = by_row if rows == 1 else by_row.repeat_interleave(_tokens_of_each(tokens, rows), 1)
        return self._by_token


class Blocked:
    """Each block's rows, padded to as many as the largest has: `members` [blocks, m], `weights` [blocks, m], 0 for
    padding. `rows` in all. Ranks come in blocks of equal length.
    """

    def __init__(self, members: Tensor, weights: Tensor, rows: int) -> None:
        self._members, self._weights, self._rows = members, weights, rows
        self._inverse = _inverse(members, weights, rows)
        self._places: tuple[Tensor, Tensor, Tensor | None] | None = None

    def shrink(self, a: Tensor, layers: int, x: Tensor) -> Sequence[Tensor]:
        taken, weights, _ = self._for_tokens(len(x), x.device)
        blocks = len(self._members)
        gathered = x.index_select(0, taken).view(blocks, -1, x.shape[1])  # [blocks, m · tokens, in]
        h = torch.bmm(a.view(blocks, -1, x.shape[1]), gathered.transpose(1, 2))  # [blocks, ranks · layers, m · tokens]
        h = h.view(blocks, -1, layers, h.shape[2]).mul_(weights)
        return h.permute(2, 0, 3, 1).unbind(0)  # each [blocks, m · tokens, ranks]

    def expand(self, output: Tensor, h: Tensor, b_t: Tensor) -> None:
        taken, _, inverse = self._for_tokens(len(output), output.device)
        part = torch.bmm(h, b_t.view(len(h), -1, b_t.shape[1])).flatten(0, 1)
        if inverse is not None:
            output.add_(part.index_select(0, inverse))
        else:
            output.index_add_(0, taken, part)

    def _for_tokens(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """(the tokens that blocks take, their weights [blocks, 1, 1, m · tokens], where each token's part lies).

        The last is None where a row has not exactly one part.
        """
        if self._places is None or len(self._places[0]) * self._rows != self._members.numel() * tokens:
            each = _tokens_of_each(tokens, self._rows)
            weights = self._weights.repeat_interleave(each, 1)[:, None, None].to(device)
            inverse = None if self._inverse is None else _tokens_of(self._inverse, each).to(device)
            self._places = _tokens_of(self._members.flatten(), each).to(device), weights, inverse
        return self._places


def products_for(by_rank: Tensor, spans: Sequence[tuple[int, int]]) -> Products:
    """The faster way for `by_rank` [ranks, rows], whose `spans` of ranks (start, stop) are one adapter's each.

    Ranks outside of all spans have no weight in any row.
    """
    ranks, rows = by_rank.shape
    if bool((by_rank == 1).all()):
        return Stacked(None)  # not even multiplied: one adapter in every row is the common case
    length = math.gcd(ranks, *(place for span in spans for place in span))
    if ranks * rows >= _FEW and length:
        by_block = by_rank[::length]  # [blocks, rows]: a block's ranks are weighed alike
        most = int((by_block != 0).sum(1).max())
        if 0 < most * _OVERHEAD <= rows:
            # Stable, so that rows stay in order; what has no weight comes last and pads.
            members = (by_block == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
            return Blocked(members, by_block.gather(1, members), rows)
    return Stacked(by_rank)


def _inverse(members: Tensor, weights: Tensor, rows: int) -> Tensor | None:
    """Where among `members` each row is, [rows]; None unless every row is there once."""
    places = (weights.flatten() != 0).nonzero().squeeze(1)
    found = members.flatten()[places]
    if len(found) != rows or not torch.equal(found.sort().values, torch.arange(rows)):
        return None
    return places[found.argsort()]


def _tokens_of(rows: Tensor, each: int) -> Tensor:
    """The tokens of rows, `each` of them side by side."""
    return (rows[:, None] * each + torch.arange(each)).flatten()


def _tokens_of_each(tokens: int, rows: int) -> int:
    assert tokens % rows == 0, f"a layer received {tokens} tokens for a batch of {rows} rows"
    return tokens // rows
