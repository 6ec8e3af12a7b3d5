"""The two products, stacked and in blocks, against plain sums in float64."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from adapters import products
from adapters.products import Blocked, Stacked, products_for

IN, OUT, LAYERS = 24, 20, 2


def spans_of(ranks: list[int]) -> list[tuple[int, int]]:
    return list(pairwise([0, *accumulate(ranks)]))


def by_rank_of(ranks: list[int], weights: Tensor) -> Tensor:
    """`weights` [rows, adapters] as weights of every rank [ranks, rows]."""
    return weights.T.repeat_interleave(torch.tensor(ranks), 0)


def check(ranks: list[int], weights: Tensor, tokens: int, generator: torch.Generator) -> None:
    total, rows = sum(ranks), len(weights)
    a = torch.randn(total, LAYERS, IN, generator=generator)
    b_t = [torch.randn(total, OUT, generator=generator) for _ in range(LAYERS)]
    x = torch.randn(rows * tokens, IN, generator=generator)
    by_rank = by_rank_of(ranks, weights)
    by_token = by_rank.double().repeat_interleave(tokens, 1)
    chosen = products_for(by_rank, spans_of(ranks))
    for _ in range(2):  # the second time from what the first has found out
        h = chosen.shrink(a.flatten(0, 1), LAYERS, x)
        for layer in range(LAYERS):
            output = torch.randn(rows * tokens, OUT, generator=generator)
            expected = output.double() + ((a[:, layer].double() @ x.double().T) * by_token).T @ b_t[layer].double()
            chosen.expand(output, h[layer], b_t[layer])
            torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_any_mix(seed: int, tokens: int, in_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the base, of one adapter, of blends; ranks alike and not; adapters that no row uses."""
    generator = torch.Generator().manual_seed(seed)
    monkeypatch.setattr(products, "_FEW", 0 if in_blocks else 1 << 30)
    monkeypatch.setattr(products, "_OVERHEAD", 0)
    adapters, rows = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
    unit = int(torch.randint(1, 4, (), generator=generator))
    ranks = [unit * int(torch.randint(1, 4, (), generator=generator)) for _ in range(adapters)]
    one_each = torch.nn.functional.one_hot(torch.randint(adapters, (rows,), generator=generator), adapters)
    weights = torch.randn(rows, adapters, generator=generator) * one_each
    if seed % 2:
        weights *= (torch.rand(rows, 1, generator=generator) < 0.7).float()
        weights += torch.randn(rows, adapters, generator=generator) * (torch.rand(rows, adapters) < 0.2)
    check(ranks, weights, tokens, generator)


@pytest.mark.parametrize(
    ("ranks", "rows_of", "expected"),
    [
        ([4] * 16, [1] * 16, Blocked),
        ([4] * 64, [1] * 64, Blocked),
        ([4, 8] * 8, [1] * 16, Blocked),
        ([4] * 8, [1] * 8, Stacked),  # so small a product is not worth cutting up
        ([4] * 32, [0] * 8 + [1] * 24, Blocked),
        ([4], [16], Stacked),
        ([4, 4], [8, 8], Stacked),
        ([4] * 16, [1] * 15 + [49], Stacked),  # a block for each would be padded to 49 rows
    ],
)
def test_choice(ranks: list[int], rows_of: list[int], expected: type) -> None:
    weights = torch.eye(len(ranks)).repeat_interleave(torch.tensor(rows_of), 0)
    assert type(products_for(by_rank_of(ranks, weights), spans_of(ranks))) is expected


def test_a_row_that_overflows_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_FEW", 0)
    generator = torch.Generator().manual_seed(0)
    weights = torch.eye(8)
    x = torch.randn(8, IN, generator=generator)
    x[5] = torch.inf
    chosen = products_for(by_rank_of([2] * 8, weights), spans_of([2] * 8))
    assert isinstance(chosen, Blocked)
    h = chosen.shrink(torch.randn(16, IN, generator=generator), 1, x)
    output = torch.zeros(8, OUT)
    chosen.expand(output, h[0], torch.randn(16, OUT, generator=generator))
    assert output.isfinite().all(1).tolist() == [row != 5 for row in range(8)]
