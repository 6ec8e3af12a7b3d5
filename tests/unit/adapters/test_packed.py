"""Packed weights: the same numbers in another order, whatever is done with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

from adapters.binding import replaced_parameters
from adapters.factors import AdapterFactors
from adapters.low_rank import LowRankBatch
from adapters.merge import Merger
from adapters.packed import PackedLinear, own_value, pack_linear_layers
from tests.factories import AdapterSpec, make_adapter, tiny_model
from tests.unit.adapters.support import PROMPT, adapted, compact, factors, token_logits

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = [(64, 64), (48, 16), (5, 7), (1, 33), (129, 100)]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_computes_what_a_linear_layer_does(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    out_features, in_features = shape
    plain = nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)
    layer = PackedLinear(plain)
    assert torch.equal(layer.dense(), plain.weight)
    for rows in ((), (1,), (3, 4), (70,), (0, 2)):
        x = torch.randn(*rows, in_features).to(dtype)
        torch.testing.assert_close(layer(x), plain(x))
    turned = torch.randn(in_features, 6).to(dtype).T
    torch.testing.assert_close(layer(turned), plain(turned))


def test_answers_questions_as_a_linear_layer_does() -> None:
    layer = PackedLinear(nn.Linear(3, 5, dtype=torch.bfloat16))
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.weight.dtype) == (3, 5, torch.bfloat16)
    assert layer.weight.shape == (5, 3)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_computes_with_parameters_that_are_given() -> None:
    plain = nn.Linear(8, 6)
    layer, x = PackedLinear(plain), torch.randn(4, 8)
    weight, bias = torch.randn(6, 8), torch.randn(6)
    torch.testing.assert_close(functional_call(layer, {"weight": weight}, (x,)), x @ weight.T + plain.bias)
    torch.testing.assert_close(functional_call(layer, {"bias": bias}, (x,)), x @ plain.weight.T + bias)
    torch.testing.assert_close(layer(x), plain(x))


def test_what_cannot_be_packed_stays_as_it_is() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64), Special(4, 4), nn.Embedding(4, 4))
    plain = copy.deepcopy(model)
    assert pack_linear_layers(model) == 1
    assert [type(module) for module in model] == [PackedLinear, nn.Linear, Special, nn.Embedding]
    assert torch.equal(own_value(model[0], "weight"), plain[0].weight)
    assert own_value(model[1], "weight") is model[1].weight


def test_without_the_operator_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def _reorder_linear_weight(self, *_: object) -> None:
            raise RuntimeError("bf16 path needs the cpu support avx512bw")

    for ops in (object(), Refusing()):
        monkeypatch.setattr("adapters.packed._ops", ops)
        model = nn.Sequential(nn.Linear(4, 4))
        assert pack_linear_layers(model) == 0
        assert type(model[0]) is nn.Linear


@DTYPES
def test_a_packed_model_answers_alike(dtype: torch.dtype) -> None:
    base = tiny_model("llama", tie_word_embeddings=True)
    plain, packed = adapted(base, dtype), adapted(base, dtype, packed=True)
    bound = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(token_logits(packed, [PROMPT]), token_logits(plain, [PROMPT]), rtol=0, atol=bound)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        ours, theirs = packed.tensor(name), plain.tensor(name)
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_blends_and_folds_of_saved_and_adapted_weights(tmp_path: Path) -> None:
    """What reads a weight of the base: a blend of saved modules, a fold, what a fold has lost."""
    base = tiny_model("llama")
    plain, packed = adapted(base), adapted(base, packed=True)
    members = []
    for name, spec in {
        "saved": AdapterSpec(seed=1, modules_to_save=["lm_head"]),
        "biased": AdapterSpec(seed=2, target_modules=["q_proj", "lm_head"]),
    }.items():
        path = make_adapter(base, spec, tmp_path / name)
        replaced = replaced_parameters(compact(path).extras, plain.tensor)
        members.append(AdapterFactors(name, factors(path).layers, replaced))
    batch = LowRankBatch(members, torch.tensor([[0.7, -0.4]]))
    expected = token_logits(plain, [PROMPT], batch)
    assert not torch.allclose(expected, token_logits(plain, [PROMPT]), atol=1e-2)
    torch.testing.assert_close(token_logits(packed, [PROMPT], batch), expected, rtol=0, atol=2e-4)

    before = token_logits(packed, [PROMPT])
    merger, selection = Merger(packed), [(members[0], 0.7), (members[1], -0.4)]
    for _ in range(2):
        merger.fold(selection)
        torch.testing.assert_close(token_logits(packed, [PROMPT]), expected, rtol=0, atol=1e-3)
        assert merger.rounding(selection).merge_error < 1e-5
        merger.restore()
        assert torch.equal(token_logits(packed, [PROMPT]), before)
