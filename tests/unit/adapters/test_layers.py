"""Mixed batches: every row gets its own selection, exactly as if it were alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.factors import AdapterFactors, FactorStack, LayerFactors
from adapters.layers import AdaptedModel, AdaptedModule
from adapters.low_rank import LowRankBatch
from adapters.targets import BaseModules
from adapters.tensor_file import LARGEST_IN_FACTORS
from tests.factories import AdapterSpec, Arch, make_adapter, peft_logits, peft_reference, rewrite, tiny_model
from tests.unit.adapters.support import BANK, PROMPT, adapted, alone, factors, token_logits

ALL = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
FEW = {"llama": ["v_proj"], "qwen2": ["q_proj"], "gpt2": ["c_fc"], "opt": ["fc1"]}
TEXTS = (b"The quick brown fox", b"jumps over the lazy", b"dogs, of Gallia omn", b"is divisa in partes")
PROMPTS = [list(text) for text in TEXTS]
ARCHS: list[Arch] = ["llama", "qwen2", "gpt2", "opt"]


def specs(arch: Arch) -> dict[str, AdapterSpec]:
    """Different ranks, tile lengths, banks, topk and targets."""
    return {
        "wide": AdapterSpec(seed=1, r=4, target_modules=ALL[arch]),
        "narrow": AdapterSpec(seed=2, r=2, topk=3, vector_length=32, num_vectors=40, target_modules=FEW[arch]),
        "full": AdapterSpec(seed=3, r=3, compact=False, target_modules=ALL[arch][:2], layers_to_transform=[1]),
        "head": AdapterSpec(seed=4, r=1, topk=1, target_modules=["lm_head"]),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Arch, Mapping[str, Path]]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        arch: {name: make_adapter(tiny_model(arch), spec, root / arch / name) for name, spec in specs(arch).items()}
        for arch in ARCHS
    }


@pytest.fixture(scope="module")
def llama(written: Mapping[Arch, Mapping[str, Path]]) -> Mapping[str, AdapterFactors]:
    return {name: factors(path) for name, path in written["llama"].items()}


@pytest.fixture(params=["as chosen", "in blocks"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixes here are so small that blocks would never be chosen."""
    if request.param == "in blocks":
        monkeypatch.setattr("adapters.products._FEW", 0)
        monkeypatch.setattr("adapters.products._OVERHEAD", 0)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.usefixtures("products")
@pytest.mark.filterwarnings("ignore::UserWarning")
class TestMixedBatch:
    @pytest.mark.parametrize("arch", ARCHS)
    def test_every_row_equals_peft(self, arch: Arch, written: Mapping[Arch, Mapping[str, Path]]):
        model, paths = tiny_model(arch), written[arch]
        batch = LowRankBatch([factors(path) for path in paths.values()], torch.eye(4))
        rows = token_logits(adapted(model), PROMPTS, batch)
        for prompt, row, path in zip(PROMPTS, rows, paths.values(), strict=True):
            close(row, peft_logits(peft_reference(model, path), prompt))

    @pytest.mark.parametrize("arch", ARCHS)
    def test_every_row_equals_that_row_alone(self, arch: Arch, written: Mapping[Arch, Mapping[str, Path]]):
        model = adapted(tiny_model(arch))
        present = [factors(path) for path in written[arch].values()]
        weights = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0.7, -1.3, 0.4, 0], [0, 0, -1, 2]])
        rows = token_logits(model, PROMPTS, LowRankBatch(present, weights))
        for prompt, row, own in zip(PROMPTS, rows, weights, strict=True):
            solo = token_logits(model, [prompt], LowRankBatch(present, own[None]))[0]
            close(row, solo)
        close(rows[0], token_logits(model, PROMPTS[:1])[0])
        assert all((rows[i] - token_logits(model, [PROMPTS[i]])[0]).abs().max() > 0.5 for i in (1, 2, 3))

    def test_one_row_of_weights_stands_for_all(self, llama: Mapping[str, AdapterFactors]):
        model, present = adapted(tiny_model("llama")), [llama["wide"], llama["full"]]
        weights = torch.tensor([[0.5, -1.0]])
        one = token_logits(model, PROMPTS, LowRankBatch(present, weights))
        each = token_logits(model, PROMPTS, LowRankBatch(present, weights.expand(4, -1)))
        close(one, each)

    def test_order_and_repetition_of_adapters_do_not_matter(self, llama: Mapping[str, AdapterFactors]):
        model = adapted(tiny_model("llama"))
        first = alone(llama["wide"], llama["narrow"], weights=[0.6, 0.4])
        second = alone(llama["narrow"], llama["wide"], llama["wide"], weights=[0.4, 0.1, 0.5])
        close(token_logits(model, PROMPTS, first), token_logits(model, PROMPTS, second))

    def test_decoding_one_token_of_many_rows(self, llama: Mapping[str, AdapterFactors]):
        """[rows, 1, features]: rows and rows · tokens are the same number."""
        model = adapted(tiny_model("llama"))
        prompts = [[byte] for byte in b"abcd"]
        batch = LowRankBatch(list(llama.values()), torch.eye(4))
        rows = token_logits(model, prompts, batch)
        for i, adapter in enumerate(llama.values()):
            close(rows[i : i + 1], token_logits(model, prompts[i : i + 1], alone(adapter)))

    def test_a_batch_is_reused_from_step_to_step(self, llama: Mapping[str, AdapterFactors]):
        model = adapted(tiny_model("llama"))
        batch = LowRankBatch(list(llama.values()), torch.eye(4))
        assert torch.equal(token_logits(model, PROMPTS, batch), token_logits(model, PROMPTS, batch))


@pytest.mark.usefixtures("products")
class TestSharedStack:
    """Batches that come and go on one stack, as the engine makes them, with what siblings share."""

    @pytest.mark.parametrize("arch", ARCHS)
    def test_batches_of_any_adapters(self, arch: Arch, written: Mapping[Arch, Mapping[str, Path]]):
        model = adapted(tiny_model(arch))
        with model.finding_siblings():
            token_logits(model, PROMPTS[:1])
        stack = FactorStack(model.siblings)
        everybody = [factors(path) for path in written[arch].values()]
        draw = random.Random(0)
        for _ in range(12):
            present = draw.sample(everybody, draw.randint(1, 4))
            weights = torch.tensor([[draw.choice([0.0, 1.0, -0.5]) for _ in present] for _ in PROMPTS])
            rows = token_logits(model, PROMPTS, LowRankBatch(present, weights, stack))
            close(rows, token_logits(model, PROMPTS, LowRankBatch(present, weights)))

    def test_few_of_many_are_gathered(self, llama: Mapping[str, AdapterFactors]):
        """Others stand between them in the stack."""
        model, stack = adapted(tiny_model("llama")), FactorStack()
        first, last = llama["wide"], llama["full"]
        others = [replace(first, digest=f"other-{i}") for i in range(8)]
        stack.hold([first, *others, last])
        batch = LowRankBatch([first, last], torch.eye(2).repeat(2, 1), stack)
        rows = token_logits(model, PROMPTS, batch)
        for i, adapter in enumerate((first, last, first, last)):
            close(rows[i], token_logits(model, PROMPTS[i : i + 1], alone(adapter))[0])

    def test_layers_that_read_the_same_input_are_siblings(self):
        model = adapted(tiny_model("llama"))
        with model.finding_siblings():
            token_logits(model, PROMPTS[:1])
        block = "model.layers.0"
        attention = tuple(f"{block}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
        assert model.siblings[attention[1]] == attention
        assert model.siblings[f"{block}.mlp.up_proj"] == (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
        assert model.siblings[f"{block}.self_attn.o_proj"] == (f"{block}.self_attn.o_proj",)
        assert model.siblings["lm_head"] == ("lm_head",)

    def test_a_layer_that_runs_twice_has_no_siblings(self):
        model, _ = TestShapes().model()
        x = torch.randn(3, 4)
        with model.finding_siblings():
            model.model.flat(x)
            model.model.flat(x)
        assert model.siblings == {}

    def test_a_forward_forgets_the_input_of_the_last(self, llama: Mapping[str, AdapterFactors]):
        """The same tensor object may come again with other contents."""
        model = adapted(tiny_model("llama"))
        layer = model.model.model.layers[0].self_attn.q_proj
        batch, x = alone(llama["wide"]), torch.randn(1, 2, 64)
        with model.using(batch):
            layer(x)
        x += 1
        with model.using(batch):
            again = layer(x)
        with model.using(alone(llama["wide"])):
            torch.testing.assert_close(again, layer(x))


@pytest.mark.usefixtures("products")
class TestBlends:
    def test_a_blend_is_the_weighted_sum_of_deltas(self, llama: Mapping[str, AdapterFactors]):
        """In one layer, where nothing non-linear comes between."""
        name, x = "model.layers.1.self_attn.q_proj", torch.randn(3, 5, 64)
        model = adapted(tiny_model("llama"))
        layer = model.model.get_submodule(name)
        weights = {"wide": 0.7, "full": -1.3}
        with model.using(alone(*(llama[key] for key in weights), weights=list(weights.values()))):
            blended = layer(x)
        expected = layer(x)
        for key, weight in weights.items():
            own = llama[key].layers[name]
            expected = expected + weight * (x @ own.a.T @ own.b_t)
        torch.testing.assert_close(blended, expected, rtol=1e-4, atol=1e-4)

    def test_an_adapter_less_itself_is_the_base(self, llama: Mapping[str, AdapterFactors]):
        model = adapted(tiny_model("llama"))
        batch = alone(llama["wide"], llama["wide"], weights=[2.5, -2.5])
        close(token_logits(model, PROMPTS, batch), token_logits(model, PROMPTS))


@pytest.mark.usefixtures("products")
class TestNeighbours:
    """What one row's adapter does, however wild, stays in its row."""

    @pytest.mark.parametrize("scale", [1e6, LARGEST_IN_FACTORS])
    @pytest.mark.parametrize("arch", ["llama", "opt"])
    def test_an_overflow_stays_in_its_row(self, scale: float, arch: Arch, written: Mapping[Arch, Mapping[str, Path]]):
        model = adapted(tiny_model(arch))
        sane, wild = (factors(written[arch][name]) for name in ("narrow", "wide"))
        wild = AdapterFactors("wild", {n: LayerFactors(f.a * scale, f.b_t * scale) for n, f in wild.layers.items()})
        weights = torch.tensor([[0.0, 0.0], [1, 0], [0, 1], [0, 0]])
        rows = token_logits(model, PROMPTS, LowRankBatch([sane, wild], weights))
        close(rows[0], token_logits(model, PROMPTS[:1])[0])
        close(rows[1], token_logits(model, PROMPTS[1:2], alone(sane))[0])
        close(rows[3], token_logits(model, PROMPTS[3:])[0])
        assert not (rows[2] - token_logits(model, PROMPTS[2:3], alone(sane))[0]).abs().max() < 1

    def test_the_largest_bank_that_is_read_stays_in_its_row(self, tmp_path: Path):
        base = tiny_model("llama")
        source = make_adapter(base, AdapterSpec(topk=3, target_modules=ALL["llama"]), tmp_path / "source")
        wild = factors(rewrite(source, tmp_path / "wild", {BANK: torch.full((32, 16), LARGEST_IN_FACTORS)}))
        rows = token_logits(adapted(base), PROMPTS[:2], LowRankBatch([wild], torch.tensor([[1.0], [0.0]])))
        close(rows[1], peft_logits(base, PROMPTS[1]))

    def test_a_16_bit_neighbour_does_not_overflow_either(self, written: Mapping[Arch, Mapping[str, Path]]):
        model = adapted(tiny_model("llama"), torch.float16)
        wild = factors(written["llama"]["wide"])
        wild = AdapterFactors("wild", {n: LayerFactors(f.a * 1e6, f.b_t * 1e6) for n, f in wild.layers.items()})
        rows = token_logits(model, PROMPTS[:2], LowRankBatch([wild], torch.tensor([[1.0], [0.0]])))
        torch.testing.assert_close(rows[1], token_logits(model, PROMPTS[1:2])[0], rtol=0, atol=0.1)

    def test_rows_without_adapters_are_the_bases_to_the_bit(self, llama: Mapping[str, AdapterFactors]):
        model = adapted(tiny_model("llama"))
        batch = LowRankBatch([llama["wide"]], torch.tensor([[1.0], [0], [0], [1]]))
        assert torch.equal(token_logits(model, PROMPTS, batch)[1:3], token_logits(model, PROMPTS)[1:3])


class Flat(nn.Module):
    """A layer that flattens rows and tokens, and one that does not know of rows at all."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


@pytest.mark.usefixtures("products")
class TestShapes:
    def model(self) -> tuple[AdaptedModel, AdapterFactors]:
        flat = Flat()
        model = AdaptedModel(flat, BaseModules.of(flat, model_type="flat"))
        return model, AdapterFactors("a", {"flat": LayerFactors(torch.randn(2, 4), torch.randn(2, 6))})

    @pytest.mark.parametrize("tokens", [1, 2, 5])
    def test_flattened_rows_are_found_again(self, tokens: int):
        model, adapter = self.model()
        x = torch.randn(3, tokens, 4)
        weights = torch.tensor([[1.0], [0.0], [-2.0]])
        delta = x @ adapter.layers["flat"].a.T @ adapter.layers["flat"].b_t
        with model.using(LowRankBatch([adapter], weights)):
            got = model.model(x)
        torch.testing.assert_close(got, model.model(x) + weights[:, :, None] * delta)

    def test_more_axes_than_tokens(self):
        model, adapter = self.model()
        x, weights = torch.randn(3, 2, 5, 4), torch.tensor([[1.0], [0.0], [-2.0]])
        delta = x @ adapter.layers["flat"].a.T @ adapter.layers["flat"].b_t
        layer = model.model.flat
        with model.using(LowRankBatch([adapter], weights)):
            got = layer(x)
        torch.testing.assert_close(got, layer(x) + weights[:, :, None, None] * delta)

    def test_rows_that_cannot_be_told_apart_are_our_bug(self):
        model, adapter = self.model()
        with (
            model.using(LowRankBatch([adapter], torch.tensor([[1.0], [0.0], [1.0]]))),
            pytest.raises(AssertionError, match="3 rows"),
        ):
            model.model.flat(torch.randn(7, 4))

    def test_weights_belong_to_adapters(self):
        _, adapter = self.model()
        with pytest.raises(AssertionError):
            LowRankBatch([adapter], torch.ones(3, 2))


class TestAdaptedModel:
    @pytest.mark.parametrize("arch", ARCHS)
    def test_wrapping_changes_nothing(self, arch: Arch):
        base = tiny_model(arch)
        assert torch.equal(token_logits(adapted(base), [PROMPT])[0], peft_logits(base, PROMPT))

    def test_layers_still_answer_as_themselves(self):
        model = adapted(tiny_model("qwen2"))
        layer = model.model.model.layers[0].self_attn.q_proj
        own = model.base_layer("model.layers.0.self_attn.q_proj")
        assert isinstance(layer, AdaptedModule)
        assert (layer.weight is own.weight, layer.bias is own.bias) == (True, True)
        assert (layer.in_features, layer.out_features) == (64, 64)
        assert not hasattr(layer, "no_such_attribute")
        with pytest.raises(AttributeError):
            layer.no_such_attribute  # noqa: B018

    def test_the_module_tree_stays_a_tree(self):
        model = adapted(tiny_model("llama"))
        assert len(list(model.model.named_modules())) == len(model.modules.kinds) + model.wrapped
        wrapped = {id(p) for p in model.model.parameters()}
        assert len(wrapped) == len(list(tiny_model("llama").parameters()))

    def test_the_batch_lasts_as_long_as_its_block(self, llama: Mapping[str, AdapterFactors]):
        model = adapted(tiny_model("llama"))
        batch = alone(llama["wide"])
        with model.using(batch):
            assert model.batch is batch
            with model.using(None):
                assert model.batch is None
            assert model.batch is batch
        assert model.batch is None

    def test_a_failing_forward_leaves_no_batch_behind(self, llama: Mapping[str, AdapterFactors]):
        model = adapted(tiny_model("llama"))
        before = token_logits(model, PROMPTS)
        batch = LowRankBatch([llama["wide"]], torch.tensor([[1.0], [0.5], [0.0]]))  # for other rows than come
        with pytest.raises(AssertionError):
            token_logits(model, PROMPTS, batch)
        assert model.batch is None
        assert torch.equal(token_logits(model, PROMPTS), before)

    def test_finds_the_bases_own_tensors(self):
        model = adapted(tiny_model("gpt2"))
        weight = model.tensor("transformer.h.0.attn.c_attn.weight")
        assert weight is not None
        assert weight.shape == (64, 192)
        assert model.tensor("transformer.wte.weight") is model.tensor("lm_head.weight")
        for name in ("", "weight", "lm_head.bias", "lm_head.in_features", "transformer.h.9.ln_1.bias", "config.dtype"):
            assert model.tensor(name) is None, name

    def test_size_of_factors(self, llama: Mapping[str, AdapterFactors]):
        assert llama["head"].nbytes == 4 * (64 + 272)


# --- 16 bits --------------------------------------------------------------------------------------

SEEDS = (1, 2, 3)


def largest_error(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    return max(float((ours - exact).abs().max()) for ours, exact in zip(outputs, reference, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
def test_16_bit_models_err_no_more_than_pefts(arch: Arch, dtype: torch.dtype, tmp_path: Path):
    """Against the same model (its weights rounded to 16 bits) computed in float32."""
    model = tiny_model(arch).to(dtype)
    exact_model: PreTrainedModel = copy.deepcopy(model).float()
    ours, theirs, exact = [], [], []
    for seed in SEEDS:
        spec = replace(AdapterSpec(seed=seed), target_modules=ALL[arch])
        path = make_adapter(exact_model, spec, tmp_path / str(seed))
        in_16, in_32 = peft_reference(model, path), peft_reference(exact_model, path)
        own = adapted(model, dtype)
        for prompt in PROMPTS:
            ours.append(token_logits(own, [prompt], alone(factors(path)))[0])
            theirs.append(peft_logits(in_16, prompt).float())
            exact.append(peft_logits(in_32, prompt))
    assert largest_error(ours, exact) <= 1.1 * largest_error(theirs, exact)
