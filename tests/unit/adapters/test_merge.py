"""Folded weights compute what the low-rank path computes, and restored ones are the pristine ones, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adapters.errors import InvalidSelection
from adapters.factors import AdapterFactors, LayerFactors
from adapters.layers import AdaptedModel
from adapters.low_rank import LowRankBatch
from adapters.merge import FoldReport, Merger
from adapters.targets import BaseModules
from tests.factories import AdapterSpec, Arch, make_adapter, peft_logits, peft_reference, tiny_model
from tests.unit.adapters.support import PROMPT, adapted, alone, factors, token_logits

ARCHS: list[Arch] = ["llama", "qwen2", "gpt2", "opt"]


def snapshot(model: AdaptedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def assert_pristine(model: AdaptedModel, before: dict[str, Tensor]) -> None:
    after = dict(model.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def pair(arch: Arch, tmp_path: Path) -> tuple[AdapterFactors, AdapterFactors]:
    """Two adapters of different rank and targets."""
    model = tiny_model(arch)
    wide = make_adapter(model, AdapterSpec(seed=1, target_modules="all-linear"), tmp_path / "wide")
    few = make_adapter(model, AdapterSpec(seed=2, r=2, topk=3, layers_to_transform=[0]), tmp_path / "few")
    return factors(wide), factors(few)


@pytest.mark.parametrize("arch", ARCHS)
def test_fold_computes_what_the_low_rank_path_computes(arch: Arch, tmp_path: Path):
    model = adapted(tiny_model(arch))
    merger = Merger(model)
    wide, few = pair(arch, tmp_path)
    for selection in ([(wide, 1.0)], [(wide, 0.7), (few, -1.3)], [(few, 1.0)]):
        present, weights = zip(*selection, strict=True)
        beside = token_logits(model, [PROMPT], alone(*present, weights=weights))
        merger.fold(selection)
        report = merger.rounding(selection)
        assert merger.is_folded
        torch.testing.assert_close(token_logits(model, [PROMPT]), beside, rtol=0, atol=5e-4)
        assert 0 <= report.merge_error < 1e-5
        merger.restore()
        assert not merger.is_folded


def test_a_fold_replaces_the_one_before(tmp_path: Path):
    model = adapted(tiny_model("llama"))
    wide, few = pair("llama", tmp_path)
    expected = token_logits(model, [PROMPT], alone(few))
    before = snapshot(model)
    merger = Merger(model)
    merger.fold([(wide, 1.0)])
    merger.fold([(few, 1.0)])
    torch.testing.assert_close(token_logits(model, [PROMPT]), expected, rtol=0, atol=5e-4)
    merger.restore()
    merger.restore()  # does nothing
    assert_pristine(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_hundreds_of_cycles_change_no_bit(arch: Arch, dtype: torch.dtype, tmp_path: Path):
    model = adapted(tiny_model(arch), dtype)
    before, merger, adapters = snapshot(model), Merger(model), pair(arch, tmp_path)
    for cycle in range(150):
        merger.fold([(adapters[cycle % 2], 1.0 - 0.01 * cycle)])
        if cycle % 3:
            merger.restore()
    assert any(not torch.equal(p, before[name]) for name, p in model.model.named_parameters()) == merger.is_folded
    merger.restore()
    assert_pristine(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_weight_that_one_replaces_and_another_adapts_is_rounded_once(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 30)).requires_grad_(False).to(dtype)
    own = base[0].weight.clone()
    saved = (own + torch.randn(own.shape, generator=generator)).to(dtype)
    layer = LayerFactors(*(torch.randn(2, features, generator=generator) for features in (40, 30)))
    selection = [
        (AdapterFactors("saves", {}, {"0": {"weight": saved}}), 0.3),
        (AdapterFactors("adapts", {"0": layer}), -0.7),
    ]
    model = AdaptedModel(base, BaseModules.of(base, model_type="linear"))
    merger = Merger(model)
    merger.fold(selection)
    folded, report = model.base_layer("0").weight.double(), merger.rounding(selection)
    change = -0.7 * layer.b_t.double().T @ layer.a.double()
    expected = own.double() + 0.3 * (saved.double() - own.double()) + change
    once = (expected.float().to(dtype).double() - expected).norm()
    assert float((folded - expected).norm()) == pytest.approx(float(once), rel=1e-3, abs=1e-5)
    assert report.merge_error == pytest.approx(float(once / change.norm()), rel=1e-3, abs=1e-6)


class TestTiedWeights:
    @pytest.fixture
    def tied(self, tmp_path: Path) -> tuple[AdaptedModel, AdapterFactors]:
        model = tiny_model("llama", tie_word_embeddings=True)
        path = make_adapter(
            tiny_model("llama"), AdapterSpec(target_modules=["q_proj", "lm_head"]), tmp_path / "adapter"
        )
        return adapted(model), factors(path)

    def test_folding_into_lm_head_leaves_the_embeddings_alone(self, tied: tuple[AdaptedModel, AdapterFactors]):
        model, adapter = tied
        head, embeddings = model.base_layer("lm_head"), model.model.get_input_embeddings()
        assert head.weight is embeddings.weight
        own, values = embeddings.weight, embeddings.weight.detach().clone()
        beside = token_logits(model, [PROMPT], alone(adapter))
        merger = Merger(model)
        merger.fold([(adapter, 1.0)])
        assert embeddings.weight is own
        assert torch.equal(own, values)
        assert not torch.equal(head.weight, values)
        torch.testing.assert_close(token_logits(model, [PROMPT]), beside, rtol=0, atol=5e-4)

    def test_restoring_ties_again(self, tied: tuple[AdaptedModel, AdapterFactors]):
        model, adapter = tied
        before = snapshot(model)
        own = model.model.get_input_embeddings().weight
        merger = Merger(model)
        for _ in range(5):
            merger.fold([(adapter, 1.0)])
            merger.fold([(adapter, -0.5)])
            assert model.moved == {"lm_head"}, "for whoever remembers where weights are"
            merger.restore()
            assert model.base_layer("lm_head").weight is own
            assert not model.moved
        assert_pristine(model, before)

    def test_equals_peft_on_the_low_rank_path(self, tmp_path: Path):
        base = tiny_model("llama", tie_word_embeddings=True)
        path = make_adapter(base, AdapterSpec(target_modules=["v_proj"]), tmp_path)
        ours = token_logits(adapted(base), [PROMPT], alone(factors(path)))[0]
        torch.testing.assert_close(ours, peft_logits(peft_reference(base, path), PROMPT), rtol=0, atol=2e-4)


class TestReport:
    def test_nothing_folded(self):
        merger = Merger(adapted(tiny_model("llama")))
        merger.fold([])
        assert merger.rounding([]) == FoldReport(0.0, None)

    def test_a_weight_of_zero_folds_nothing(self, tmp_path: Path):
        model = adapted(tiny_model("llama"))
        before, (wide, _) = snapshot(model), pair("llama", tmp_path)
        merger = Merger(model)
        merger.fold([(wide, 0.0)])
        assert merger.rounding([(wide, 0.0)]).merge_error == 0.0
        assert_pristine(model, before)

    def test_is_the_share_of_the_worst_layer_that_rounding_lost(self, tmp_path: Path):
        model = adapted(tiny_model("llama"), torch.bfloat16)
        before, (wide, _) = snapshot(model), pair("llama", tmp_path)
        merger = Merger(model)
        merger.fold([(wide, 0.01)])
        report = merger.rounding([(wide, 0.01)])
        errors = {}
        for name, layer in wide.layers.items():
            change = 0.01 * (layer.b_t.T @ layer.a)
            pristine = before[f"{name}.base_layer.weight"].float()
            lost = model.base_layer(name).weight.detach().float() - pristine - change
            errors[name] = float(lost.norm() / change.norm())
        assert report.layer == max(errors, key=lambda name: errors[name])
        assert report.merge_error == pytest.approx(max(errors.values()), rel=1e-3)
        assert 0.01 < report.merge_error < 1

    def test_smaller_adapters_lose_more(self, tmp_path: Path):
        merger = Merger(adapted(tiny_model("llama"), torch.bfloat16))
        wide, _ = pair("llama", tmp_path)
        errors = []
        for weight in (0.01, 1.0):
            merger.fold([(wide, weight)])
            errors.append(merger.rounding([(wide, weight)]).merge_error)
        small, large = errors
        assert small > 5 * large


class TestRefusals:
    """A fold that cannot be is refused, and leaves the pristine weights in place."""

    @pytest.mark.parametrize("weight", [1e6, 1e38, math.inf, math.nan])
    def test_a_fold_that_overflows(self, weight: float, tmp_path: Path):
        model = adapted(tiny_model("llama"), torch.float16)
        before, merger, (wide, few) = snapshot(model), Merger(model), pair("llama", tmp_path)
        with pytest.raises(InvalidSelection, match="overflows"):
            merger.fold([(few, 1.0), (wide, weight)])
        assert not merger.is_folded
        assert_pristine(model, before)

    def test_a_quantized_layer(self):
        class Int8Linear(nn.Linear):
            """As libraries make them: `weight` holds integers."""

            def __init__(self) -> None:
                super().__init__(4, 4, bias=False)
                self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.weight.float().T * 0.5

        base = nn.Sequential(nn.Linear(4, 4), Int8Linear()).requires_grad_(False)
        model = AdaptedModel(base, BaseModules.of(base, model_type="int8"))
        layer = LayerFactors(torch.randn(2, 4), torch.randn(2, 4))
        adapter = AdapterFactors("a", {"0": layer, "1": layer})
        x, before = torch.randn(3, 4), snapshot(model)

        with pytest.raises(InvalidSelection, match="quantized"):
            Merger(model).fold([(adapter, 1.0)])

        assert_pristine(model, before)
        with model.using(LowRankBatch([adapter], torch.ones(1, 1))):
            beside = base(x)
        hidden = base[0](x) + x @ layer.a.T @ layer.b_t
        torch.testing.assert_close(beside, base[1](hidden) + hidden @ layer.a.T @ layer.b_t)

    def test_an_error_in_the_middle_restores_what_was_folded(self, tmp_path: Path):
        model = adapted(tiny_model("llama"))
        before, merger, (wide, _) = snapshot(model), Merger(model), pair("llama", tmp_path)
        broken = dict(wide.layers)
        last = next(reversed(broken))
        broken[last] = LayerFactors(broken[last].a[:, :3], broken[last].b_t)
        with pytest.raises(RuntimeError):
            merger.fold([(AdapterFactors("broken", broken), 1.0)])
        assert not merger.is_folded
        assert_pristine(model, before)


def test_a_pristine_weight_is_found_while_another_is_folded(tmp_path: Path):
    model = adapted(tiny_model("gpt2"))
    (wide, _) = pair("gpt2", tmp_path)
    name = next(iter(wide.layers))
    before = model.base_layer(name).weight.detach().clone()
    Merger(model).fold([(wide, 1.0)])
    assert not torch.equal(model.base_layer(name).weight, before)
    found = model.tensor(f"{name}.weight")
    assert found is not None
    assert torch.equal(found, before)
