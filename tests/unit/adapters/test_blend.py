"""A blend is one compact adapter whose deltas are the weighted sum of its members', exactly, and PEFT loads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.blend import blend
from adapters.checkpoint import TopKCheckpoint, index_dtype, read_checkpoint
from adapters.config import VBLoRAConfig
from adapters.errors import InvalidSelection, ShapeMismatch
from adapters.export import write_adapter
from adapters.layout import AdapterLayout
from adapters.lora import stack_lora
from adapters.parameters import Storage
from adapters.targets import LayerShape
from adapters.vector_bank import VectorBank
from tests.factories import AdapterSpec, make_adapter, peft_logits, peft_reference, tiny_model
from tests.unit.adapters.support import PROMPT, adapted, alone, compact, factors, token_logits

MODEL = tiny_model("llama")
LAYERS = (LayerShape("a.q", 24, 12), LayerShape("a.v", 24, 24), LayerShape("b.q", 12, 36))
TOLERANCE = 2e-6


def random_adapter(
    seed: int,
    *,
    layers: tuple[LayerShape, ...] = LAYERS,
    r: int = 2,
    num_vectors: int = 9,
    vector_length: int = 12,
    topk: int = 2,
    dtype: torch.dtype = torch.float32,
    bank: Tensor | None = None,
) -> TopKCheckpoint:
    generator = torch.Generator().manual_seed(seed)
    config = VBLoRAConfig(
        r=r,
        num_vectors=num_vectors,
        vector_length=vector_length,
        topk=topk,
        save_only_topk_weights=True,
        target_modules=tuple(layer.name for layer in layers),
    )
    positions = sum(r * (layer.in_features + layer.out_features) // vector_length for layer in layers)
    chosen = torch.rand(positions, num_vectors, generator=generator).argsort(dim=-1)[:, :topk]
    weights = torch.rand(positions, topk, generator=generator).softmax(-1)[:, :-1].to(dtype)
    vectors = torch.randn(num_vectors, vector_length, generator=generator).to(dtype) if bank is None else bank
    layout = AdapterLayout(config, Storage.TOPK, layers)
    return TopKCheckpoint(layout, VectorBank(vectors), chosen.to(index_dtype(config)), weights)


def deltas(checkpoint: TopKCheckpoint) -> dict[str, Tensor]:
    """By layer, dense, in float64 from the float32 mixtures."""
    return {layer.name: b_t.double().T @ a.double() for layer, a, b_t in checkpoint.factors()}


def assert_is_the_sum(blended: TopKCheckpoint, members: list[tuple[TopKCheckpoint, float]]) -> None:
    """Within 2e-6 of Σ |w| · max |delta|, layer by layer; and well-formed."""
    got = deltas(blended)
    expected: dict[str, Tensor] = {}
    scale: dict[str, float] = {}
    for checkpoint, weight in members:
        for name, delta in deltas(checkpoint).items():
            expected[name] = expected.get(name, torch.zeros_like(delta)) + weight * delta
            scale[name] = scale.get(name, 0.0) + abs(weight) * float(delta.abs().max())
    assert got.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((got[name] - delta).abs().max()) <= TOLERANCE * scale[name] + 1e-30
    ordered = blended.indices.long().sort(-1).values
    assert bool((ordered[:, 1:] != ordered[:, :-1]).all()), "indices differ within a position"
    assert bool((blended.weights.sum(-1) <= 1).all())


adapters = st.builds(
    random_adapter,
    st.integers(0, 2**31),
    layers=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3, unique=True).map(tuple),
    r=st.integers(1, 3),
    num_vectors=st.integers(4, 12),
    vector_length=st.sampled_from([1, 2, 3, 4, 6, 12]),
    topk=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
weights = st.one_of(st.floats(-3, 3), st.sampled_from([1.0, -1.0, 0.5, 0.0, 1e-3, -1e4]))


@settings(max_examples=150)
@given(st.lists(st.tuples(adapters, weights), min_size=1, max_size=4))
def test_a_blend_is_the_weighted_sum(members: list[tuple[TopKCheckpoint, float]]) -> None:
    blended = blend(members)
    assert_is_the_sum(blended, members)
    assert blended.config.r == sum(member.config.r for member, _ in members)
    assert blended.config.vector_length == math.gcd(*(member.config.vector_length for member, _ in members))
    assert blended.config.topk == max(member.config.topk for member, _ in members)


@settings(max_examples=40)
@given(st.lists(st.tuples(adapters, weights), min_size=1, max_size=3), weights, weights)
def test_blends_blend(members: list[tuple[TopKCheckpoint, float]], outer: float, other: float) -> None:
    inner = blend(members)
    assert_is_the_sum(blend([(inner, outer), (members[0][0], other)]), [(inner, outer), (members[0][0], other)])


def test_written_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    members = [(random_adapter(1, topk=3), 0.7), (random_adapter(2, vector_length=4, topk=1), -1.3)]
    blended = blend(members)
    write_adapter(blended, tmp_path / "blend")
    again = read_checkpoint(tmp_path / "blend")
    assert isinstance(again, TopKCheckpoint)
    assert_is_the_sum(again, members)
    assert again.layout.layers == blended.layout.layers


def test_the_file_stays_small() -> None:
    """Rows that nobody refers to go, and equal ones are one."""
    bank = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    one, two = (random_adapter(seed, num_vectors=200, bank=bank) for seed in (1, 2))
    used = len(torch.cat([one.indices.flatten(), two.indices.flatten()]).unique())
    assert blend([(one, 1.0), (two, 1.0)]).config.num_vectors == used < 200
    assert blend([(one, 0.5), (one, 0.5)]).config.num_vectors == len(one.indices.unique())
    assert blend([(one, -1.0)]).config.num_vectors <= 2 * len(one.indices.unique())


def test_rows_that_are_equal_may_meet_in_one_position() -> None:
    twins = torch.ones(4, 12)
    member = random_adapter(3, num_vectors=4, topk=3, bank=twins)
    blended = blend([(member, 2.0)])
    assert_is_the_sum(blended, [(member, 2.0)])
    assert blended.config.num_vectors == blended.config.topk == 3, "as many as topk needs"


def test_a_layer_that_a_member_does_not_adapt_is_the_others_alone() -> None:
    one, two = random_adapter(1, layers=LAYERS[:1]), random_adapter(2, layers=LAYERS[1:])
    blended = blend([(one, 1.0), (two, -2.0)])
    assert_is_the_sum(blended, [(one, 1.0), (two, -2.0)])
    assert blended.config.target_modules == ("a.q", "a.v", "b.q")


def test_adapters_of_different_bases_are_refused() -> None:
    other = random_adapter(1, layers=(LayerShape("a.q", 12, 12),))
    with pytest.raises(ShapeMismatch, match="different base models"):
        blend([(random_adapter(2), 1.0), (other, 1.0)])


@pytest.mark.parametrize("members", [[], [(random_adapter(1), float("nan"))], [(random_adapter(1), float("inf"))]])
def test_what_is_no_sum_is_refused(members: list[tuple[TopKCheckpoint, float]]) -> None:
    with pytest.raises(InvalidSelection):
        blend(members)


@pytest.mark.parametrize("weight", [1e35, 1e40, 1e300, -1e300])
def test_weights_that_overflow_are_refused(weight: float) -> None:
    """Also where infinity meets the zeros of a blend whose members adapt different layers, and makes NaN."""
    zeros = blend([(random_adapter(1, layers=LAYERS[:1]), 1.0), (random_adapter(2, layers=LAYERS[1:]), 1.0)])
    assert any(not row.any() for row in zeros.bank.vectors)
    for members in ([(random_adapter(3), weight)], [(zeros, weight)]):
        with pytest.raises(InvalidSelection, match="too large"):
            blend(members)
        with pytest.raises(InvalidSelection, match="too large"):
            stack_lora(members)


def test_a_blended_extra_that_overflows_is_refused(tmp_path: Path) -> None:
    """A bank this small takes the weight; what the adapter saves does not."""
    spec = AdapterSpec(modules_to_save=["lm_head"], bank_bound=1e-12)
    member = compact(make_adapter(MODEL, spec, tmp_path / "saved"))
    base = dict(MODEL.named_parameters()).get
    with pytest.raises(InvalidSelection, match=r"too large for these adapters: lm_head\.weight overflows"):
        blend([(member, 1e39)], base)
    assert blend([(member, 1e30)], base).extras


# --- against PEFT -----------------------------------------------------------------------------------

SPECS = {
    "q": AdapterSpec(seed=1, target_modules=["q_proj"], r=2, topk=1, vector_length=8),
    "all": AdapterSpec(seed=2, target_modules="all-linear", r=3, topk=3, num_vectors=50, compact=False),
    "late": AdapterSpec(seed=3, layers_to_transform=[1], dtype=torch.bfloat16),
    "regex": AdapterSpec(seed=4, target_modules=r".*\.(k|o)_proj", dtype=torch.float16, compact=False),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return {name: make_adapter(MODEL, spec, folder / name) for name, spec in SPECS.items()}


@pytest.mark.parametrize(
    "wanted",
    [
        {"q": 1.0},
        {"q": 0.7, "all": 0.3},
        {"all": -0.5, "late": 1.2},
        {"q": 0.7, "all": -1.3, "late": 0.4, "regex": 0.25},
    ],
    ids=str,
)
def test_peft_computes_what_the_blend_of_requests_does(
    wanted: dict[str, float], trained: Mapping[str, Path], tmp_path: Path
) -> None:
    write_adapter(blend([(compact(trained[name]), weight) for name, weight in wanted.items()]), tmp_path / "blend")
    theirs = peft_logits(peft_reference(MODEL, tmp_path / "blend"), PROMPT)
    of_requests = alone(*(factors(trained[name]) for name in wanted), weights=list(wanted.values()))
    ours = token_logits(adapted(MODEL), [PROMPT], of_requests)[0]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=5e-4)
    assert float((theirs - peft_logits(MODEL, PROMPT)).abs().max()) > 0.1, "it changes something"


def test_trained_biases_and_saved_modules_are_blended_with_the_bases(tmp_path: Path) -> None:
    specs = {
        "biased": AdapterSpec(seed=1, target_modules=["q_proj"], bias="all"),
        "head": AdapterSpec(seed=2, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    }
    model = tiny_model("qwen2")  # whose q, k and v have biases
    paths = {name: make_adapter(model, spec, tmp_path / name) for name, spec in specs.items()}
    members = [(compact(paths["biased"]), 0.6), (compact(paths["head"]), -0.4)]
    with pytest.raises(InvalidSelection, match="name the base model"):
        blend(members)
    base = dict(model.named_parameters())
    blended = blend(members, base.get)
    assert blended.config.bias == "all"
    assert blended.config.modules_to_save == ("lm_head",)
    own = members[1][0].extras["base_model.model.lm_head.weight"]
    expected = base["lm_head.weight"] - 0.4 * (own - base["lm_head.weight"])
    torch.testing.assert_close(blended.extras["base_model.model.lm_head.weight"], expected.detach())
    write_adapter(blended, tmp_path / "blend")
    assert isinstance(read_checkpoint(tmp_path / "blend"), TopKCheckpoint)
    theirs = peft_reference(model, tmp_path / "blend")
    q0 = "model.layers.0.self_attn.q_proj"
    trained_bias = members[0][0].extras[f"base_model.model.{q0}.base_layer.bias"]
    expected_bias = base[f"{q0}.bias"] + 0.6 * (trained_bias - base[f"{q0}.bias"])
    torch.testing.assert_close(theirs.get_base_model().get_submodule(q0).bias, expected_bias, check_dtype=False)


def test_one_member_of_weight_1_needs_no_base(tmp_path: Path) -> None:
    path = make_adapter(MODEL, AdapterSpec(modules_to_save=["lm_head"]), tmp_path / "head")
    member = compact(path)
    blended = blend([(member, 1.0)])
    assert torch.equal(*(each.extras["base_model.model.lm_head.weight"] for each in (member, blended)))


def test_saved_by_one_and_adapted_by_another_is_refused(tmp_path: Path) -> None:
    saved = compact(make_adapter(MODEL, AdapterSpec(modules_to_save=["lm_head"]), tmp_path / "saved"))
    target = compact(make_adapter(MODEL, AdapterSpec(target_modules=["lm_head"], seed=2), tmp_path / "target"))
    with pytest.raises(InvalidSelection, match="blend them per request"):
        blend([(saved, 1.0), (target, 1.0)], dict(MODEL.named_parameters()).get)
