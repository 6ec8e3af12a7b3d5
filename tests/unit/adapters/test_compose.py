"""The two ways from a selection to factors agree with PEFT's formula, which is written out here on its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from adapters import compose

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def peft_tiles(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """PEFT's `_get_low_rank_matrix` in float64: [..., num_vectors] → [..., vector_length]."""
    best, indices = logits.double().topk(topk, dim=-1)
    return (best.softmax(-1).unsqueeze(-1) * bank.double()[indices]).sum(-2)


@st.composite
def selections(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """indices [positions, k], stored weights [positions, k - 1] in some dtype, bank. Weights of 0 and 1 occur."""
    topk = draw(st.integers(1, 8))
    num_vectors = draw(st.integers(topk, 40))
    positions, vector_length = draw(st.integers(1, 24)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([0.1, 1.0, 20.0, 200.0]))  # 200: softmax saturates to exact 0 and 1
    dtype = draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(positions, topk, generator=generator) * scale
    stored = logits.softmax(-1)[:, :-1].to(dtype)
    indices = torch.rand(positions, num_vectors, generator=generator).argsort(-1)[:, :topk]
    bank = torch.randn(num_vectors, vector_length, generator=generator)
    return indices, stored, bank


@settings(max_examples=150, deadline=None)
@given(selections())
def test_fast_path_equals_pefts_formula_on_reconstructed_logits(selection: tuple[Tensor, Tensor, Tensor]):
    indices, stored, bank = selection
    weights = compose.remainder_weights(stored)
    logits = compose.reconstruct_logits(indices, weights, len(bank))
    fast = compose.mixtures(indices, weights, bank)
    assert not logits.isnan().any()
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast.double(), peft_tiles(logits, bank, indices.shape[1]), rtol=0, atol=3e-6)


@settings(max_examples=150, deadline=None)
@given(selections())
def test_weights_are_a_mixture_whatever_the_rounding(selection: tuple[Tensor, Tensor, Tensor]):
    _, stored, _ = selection
    weights = compose.remainder_weights(stored)
    assert (weights >= 0).all()
    assert (weights <= 1).all()
    torch.testing.assert_close(weights.double().sum(-1), torch.ones(len(weights)).double(), rtol=0, atol=1e-6)
    sums = stored.float().sum(-1)
    below = sums <= 1  # there the stored weights are taken as they are, and the remainder is PEFT's
    assert torch.equal(weights[below, :-1], stored[below].float())
    assert torch.equal(weights[below, -1], 1 - sums[below])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 50.0]))
def test_selecting_and_reconstructing_are_inverse(topk: int, seed: int, scale: float):
    logits = torch.randn(5, 3, 20, generator=torch.Generator().manual_seed(seed)) * scale
    indices, weights = compose.select_topk(logits, topk)
    again, weights_again = compose.select_topk(compose.reconstruct_logits(indices, weights, 20), topk)
    # As mixtures: vectors of nearly one weight may change places, and which of weight 0 fills up does not matter.
    mixture, mixture_again = (
        torch.zeros(5, 3, 20).scatter(-1, of.long(), by) for of, by in ((indices, weights), (again, weights_again))
    )
    torch.testing.assert_close(mixture_again, mixture, rtol=1e-5, atol=1e-30)
    assert (weights.diff(dim=-1) <= 0).all(), "heaviest first"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_index_dtype_will_do(dtype: torch.dtype):
    indices = torch.tensor([[0, 2], [1, 0]])
    bank, weights = torch.randn(3, 4), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    expected = torch.stack([0.25 * bank[0] + 0.75 * bank[2], bank[1]])
    torch.testing.assert_close(compose.mixtures(indices.to(dtype), weights, bank), expected)


def test_16_bit_banks_and_weights_are_computed_in_float32():
    bank, weights = torch.randn(6, 4).bfloat16(), torch.tensor([[0.3, 0.7]]).half()
    indices = torch.tensor([[5, 1]])
    expected = weights.float() @ bank[[5, 1]].float()
    torch.testing.assert_close(compose.mixtures(indices, weights, bank), expected, rtol=1e-6, atol=1e-6)


def test_a_and_b_have_pefts_layout():
    r, in_tiles, out_tiles, length = 3, 4, 5, 2
    tiles_a, tiles_b = torch.randn(r, in_tiles, length), torch.randn(out_tiles, r, length)
    tiles = torch.cat([tiles_a.reshape(-1, length), tiles_b.reshape(-1, length)])
    tiles = tiles[compose.factor_order(r, ((in_tiles, out_tiles),))]
    a, b_t = tiles[: r * in_tiles].view(r, -1), tiles[r * in_tiles :].view(r, -1)
    assert torch.equal(a, tiles_a.reshape(r, -1))
    assert torch.equal(b_t.T, tiles_b.transpose(1, 2).reshape(-1, r))
    # Spelled out: tile t of column j of B holds the output features t · length onward.
    assert torch.equal(b_t[1, 2 * length : 3 * length], tiles_b[2, 1])


def test_delta_stands_as_the_layer_stores_its_weight():
    a, b, x = torch.randn(2, 6), torch.randn(4, 2), torch.randn(3, 6)
    low_rank = x @ a.T @ b.T
    linear = torch.nn.Linear(6, 4, bias=False)
    linear.weight.data = compose.delta(a, b)
    conv = Conv1D(4, 6)
    conv.bias.data.zero_()
    conv.weight.data = compose.delta(a, b, transposed=True)
    torch.testing.assert_close(linear(x).detach(), low_rank, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(conv(x).detach(), low_rank, rtol=1e-5, atol=1e-5)
