"""Plain LoRA adapters compute what PEFT computes, alone, stacked, folded and beside VB-LoRA; bad ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from adapters.binding import check_layout, replaced_parameters
from adapters.blend import weighted_sum
from adapters.checkpoint import LogitsCheckpoint, TopKCheckpoint
from adapters.errors import AdapterError, BadConfig, CheckpointError, InvalidSelection, ShapeMismatch
from adapters.export import converted, write_adapter
from adapters.factors import AdapterFactors, LayerFactors
from adapters.layers import AdaptedModel
from adapters.lora import LoRACheckpoint, ServedCheckpoint, stack_lora
from adapters.lora_config import LoRAConfig
from adapters.lora_layout import LoRALayout
from adapters.low_rank import LowRankBatch
from adapters.merge import Merger
from adapters.parameters import Storage
from adapters.reading import as_served, read_adapter, read_adapter_layout
from adapters.targets import LayerShape
from tests.factories import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterSpec,
    Arch,
    make_adapter,
    peft_logits,
    peft_reference,
    rewrite,
    tiny_model,
)
from tests.lora_factory import make_lora, trainable_lora
from tests.unit.adapters.support import PROMPT, adapted, alone, token_logits

ARCHS: list[Arch] = ["llama", "qwen2", "gpt2"]
MODELS = {arch: tiny_model(arch) for arch in ARCHS}
LLAMA = MODELS["llama"]
ATTENTION = {"llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
FIRST = {"llama": "layers.0.self_attn.q_proj", "qwen2": "layers.0.self_attn.q_proj", "gpt2": "h.0.attn.c_attn"}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FORMS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 3},
    "alpha of zero": {"lora_alpha": 0},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "bf16": {"dtype": torch.bfloat16, "lora_alpha": 6},
    "f16": {"dtype": torch.float16, "r": 1},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "mlp.c_proj"]},
    "regex": {"target_modules": r".*\.1\..*(v_proj|up_proj|c_attn|c_fc)"},
    "one layer": {"layers_to_transform": [1]},
    "lm_head": {"target_modules": ["lm_head"]},
    "biases of targets": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "a saved head": {"modules_to_save": ["lm_head"]},
    "all biases and saved modules that have some": {"bias": "all", "modules_to_save": ["ln_1", "k_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
}


def served(path: Path) -> ServedCheckpoint:
    return as_served(read_adapter(path))


def lora(path: Path) -> LoRACheckpoint:
    checkpoint = read_adapter(path)
    assert isinstance(checkpoint, LoRACheckpoint)
    return checkpoint


def factors_of(checkpoint: ServedCheckpoint, model: AdaptedModel, name: str) -> AdapterFactors:
    """With what it replaces, once its layout was held against the model."""
    check_layout(checkpoint.layout, model)
    layers = {layer.name: LayerFactors(a, b_t) for layer, a, b_t in checkpoint.factors()}
    return AdapterFactors(name, layers, replaced_parameters(checkpoint.extras, model.tensor))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_form_computes_what_peft_computes(arch: Arch, form: str, tmp_path: Path) -> None:
    fields = {"target_modules": ATTENTION[arch], "seed": list(FORMS).index(form), **FORMS[form]}
    path = make_lora(MODELS[arch], tmp_path / "adapter", **fields)
    theirs = peft_logits(peft_reference(MODELS[arch], path), PROMPT)
    model = adapted(MODELS[arch])
    adapter = factors_of(served(path), model, "adapter")
    ours = token_logits(model, [PROMPT], alone(adapter))[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    if form != "alpha of zero":
        assert not torch.allclose(theirs, peft_logits(MODELS[arch], PROMPT), atol=0.1), "the adapter is visible"
    merger = Merger(model)
    merger.fold([(adapter, 1.0)])
    torch.testing.assert_close(token_logits(model, [PROMPT])[0], theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_ranks_and_alphas_of_single_modules(arch: Arch, use_rslora: bool, tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {FIRST[arch]: 7, ".*(v_proj|c_fc)": 2, "q_proj": 3},
        "alpha_pattern": {"down_proj|c_fc": 20, f"^(model|transformer).{FIRST[arch]}": 1},
    }
    fields = {"target_modules": "all-linear", "use_rslora": use_rslora, "lora_alpha": 4, **patterns}
    path = make_lora(MODELS[arch], tmp_path / "adapter", **fields)
    theirs = peft_reference(MODELS[arch], path)
    model = adapted(MODELS[arch])
    adapter = factors_of(served(path), model, "adapter")
    ours = token_logits(model, [PROMPT], alone(adapter))[0]
    torch.testing.assert_close(ours, peft_logits(theirs, PROMPT), rtol=0, atol=1e-3)
    layout = lora(path).layout
    assert {2, 4, 7} <= set(layout.ranks)
    for layer, rank, scaling in zip(layout.layers, layout.ranks, layout.scalings, strict=True):
        module = theirs.base_model.model.get_submodule(layer.name)
        assert (module.r["default"], module.scaling["default"]) == (rank, pytest.approx(scaling))
    assert adapter.rank == 7


NAMES = ["model.layers.0.q_proj", "model.layers.10.q_proj", "model.layers.0.mlp.up", "q_proj", "a_q", "a.q", "x.a.q"]
KEYS = ["q_proj", "layers.0.q_proj", r"layers\.\d+\.q_proj", "model.layers.0.mlp.up", "proj", "a.q", "^a.q", ".*up", ""]


@given(st.lists(st.sampled_from([*KEYS, *NAMES]), unique=True, max_size=6))
def test_patterns_match_as_in_peft(keys: list[str]) -> None:
    patterns = {key: 10 + i for i, key in enumerate(keys)}
    config = LoRAConfig(rank_pattern=patterns)
    assert config.ranks(NAMES) == [patterns.get(get_pattern_key(keys, name), config.r) for name in NAMES]


def test_ten_thousand_names_are_matched_at_once() -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(1000)]
    config = LoRAConfig(rank_pattern={name: i + 1 for i, name in enumerate(names)})
    assert config.ranks(names) == list(range(1, 1001))


def test_a_pattern_without_end_is_given_up() -> None:
    with pytest.raises(BadConfig, match="takes too long") as caught:
        LoRAConfig(rank_pattern={"(a|aa)+x": 2}).ranks(["a" * 100])
    assert caught.value.subject == "rank_pattern"


def test_a_mixed_batch_and_blends_with_vb_lora(tmp_path: Path) -> None:
    """Every row what PEFT says, or for a blend what the sum of PEFT's deltas says."""
    ranks = {"rank_pattern": {FIRST["llama"]: 9}}
    paths = [
        make_lora(LLAMA, tmp_path / "plain", target_modules=["q_proj", "v_proj"], lora_alpha=2, **ranks),
        make_adapter(LLAMA, AdapterSpec(seed=1, target_modules="all-linear"), tmp_path / "vblora"),
        make_lora(LLAMA, tmp_path / "other", seed=2, r=2, target_modules=["down_proj", "q_proj"]),
    ]
    model = adapted(LLAMA)
    present = [factors_of(served(path), model, path.name) for path in paths]
    weights = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0.7, 0.4, -1.2]])
    got = token_logits(model, [PROMPT] * len(weights), LowRankBatch(present, weights))
    for row, path in enumerate(paths):
        torch.testing.assert_close(got[row], peft_logits(peft_reference(LLAMA, path), PROMPT), rtol=0, atol=1e-3)
    torch.testing.assert_close(got[3], peft_logits(LLAMA, PROMPT), rtol=0, atol=1e-3)
    mixed = list(zip(map(served, paths), weights[4].tolist(), strict=True))
    write_adapter(weighted_sum(mixed), tmp_path / "stored")
    torch.testing.assert_close(
        got[4], peft_logits(peft_reference(LLAMA, tmp_path / "stored"), PROMPT), rtol=0, atol=1e-3
    )
    Merger(model).fold(list(zip(present, weights[4].tolist(), strict=True)))
    torch.testing.assert_close(token_logits(model, [PROMPT])[0], got[4], rtol=0, atol=1e-3)


# --- stacking and export --------------------------------------------------------------------------


@pytest.mark.parametrize("stored_compact", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_vb_lora_as_lora_is_exact_and_loads_in_peft(arch: Arch, stored_compact: bool, tmp_path: Path) -> None:
    spec = AdapterSpec(target_modules="all-linear", compact=stored_compact, bias="vblora_only", r=3)
    source = make_adapter(MODELS[arch], spec, tmp_path / "source")
    exported = converted(read_adapter(source), Storage.LORA)
    write_adapter(exported, tmp_path / "lora")
    again = served(tmp_path / "lora")
    for (layer, a, b_t), (other, other_a, other_b) in zip(served(source).factors(), again.factors(), strict=True):
        assert (layer, True, True) == (other, torch.equal(a, other_a), torch.equal(b_t, other_b))
    config = LoraConfig.from_pretrained(str(tmp_path / "lora"))
    has_biases = arch != "llama"
    assert (config.r, config.lora_alpha, config.bias) == (3, 3, "lora_only" if has_biases else "none")
    assert config.fan_in_fan_out == (arch == "gpt2")
    assert set(config.target_modules) == set(json.loads((source / CONFIG_FILE).read_text())["target_modules"])
    expected = peft_logits(peft_reference(MODELS[arch], source), PROMPT)
    torch.testing.assert_close(peft_logits(peft_reference(MODELS[arch], tmp_path / "lora"), PROMPT), expected)


def test_null_targets_of_vb_lora_are_not_taken_for_those_of_lora(tmp_path: Path) -> None:
    """PEFT's defaults differ by type: for OPT null is six modules of VB-LoRA, and two of LoRA."""
    model = tiny_model("opt")
    source = make_adapter(model, AdapterSpec(target_modules=None), tmp_path / "named")
    source = rewrite(source, tmp_path / "source", config={"target_modules": None})
    write_adapter(converted(read_adapter(source), Storage.LORA), tmp_path / "lora")
    expected = peft_logits(peft_reference(model, source), PROMPT)
    torch.testing.assert_close(peft_logits(peft_reference(model, tmp_path / "lora"), PROMPT), expected)
    assert {"fc1", "k_proj"} <= {layer.name.rpartition(".")[2] for layer in served(tmp_path / "lora").layout.layers}


def test_an_adapter_in_its_own_storage_is_itself_and_lora_has_no_way_back(tmp_path: Path) -> None:
    plain = lora(make_lora(LLAMA, tmp_path / "plain", target_modules=["q_proj"]))
    full = read_adapter(make_adapter(LLAMA, AdapterSpec(compact=False), tmp_path / "full"))
    assert converted(plain, Storage.LORA) is plain
    assert converted(full, Storage.LOGITS) is full
    assert isinstance(converted(full, Storage.TOPK), TopKCheckpoint)
    assert isinstance(converted(converted(full, Storage.TOPK), Storage.LOGITS), LogitsCheckpoint)
    for storage in (Storage.TOPK, Storage.LOGITS):
        with pytest.raises(InvalidSelection, match="no vector bank"):
            converted(plain, storage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_written_is_what_was_read(dtype: torch.dtype, tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "lora_dropout": 0.25, "lora_alpha": 2.5}
    source = make_lora(LLAMA, tmp_path / "source", dtype=dtype, **fields)
    write_adapter(lora(source), tmp_path / "again")
    first, second = (load_file(path / WEIGHTS_FILE) for path in (source, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    configs = [json.loads((path / CONFIG_FILE).read_text()) for path in (source, tmp_path / "again")]
    assert configs[0] == configs[1]


@st.composite
def random_members(draw: st.DrawFn) -> list[tuple[LoRACheckpoint, float]]:
    layers = (LayerShape("a.q", 6, 4), LayerShape("a.v", 6, 5), LayerShape("b.q", 3, 7))
    members = []
    for seed in range(draw(st.integers(1, 3))):
        chosen = tuple(draw(st.lists(st.sampled_from(layers), min_size=1, unique=True)))
        config = LoRAConfig(
            r=draw(st.integers(1, 4)),
            lora_alpha=draw(st.floats(0, 64)),
            use_rslora=draw(st.booleans()),
            rank_pattern=draw(st.dictionaries(st.sampled_from(["q", "v", "a.q"]), st.integers(1, 5))),
            alpha_pattern=draw(st.dictionaries(st.sampled_from(["q", "b.q"]), st.floats(0, 9))),
            target_modules=tuple(layer.name for layer in chosen),
        )
        layout, generator = LoRALayout.of(config, chosen), torch.Generator().manual_seed(seed)
        matrices = {
            layer.name: (
                torch.randn(rank, layer.in_features, generator=generator),
                torch.randn(layer.out_features, rank, generator=generator),
            )
            for layer, rank in zip(chosen, layout.ranks, strict=True)
        }
        members.append((LoRACheckpoint(layout, matrices), draw(st.floats(-3, 3, width=32))))
    return members


def dense(checkpoint: ServedCheckpoint) -> dict[str, Tensor]:
    return {layer.name: b_t.double().T @ a.double() for layer, a, b_t in checkpoint.factors()}


@settings(deadline=None)
@given(random_members())
def test_a_stack_is_the_weighted_sum(members: list[tuple[LoRACheckpoint, float]]) -> None:
    stacked = stack_lora(members)
    got, expected, scale = dense(stacked), {}, {}
    for checkpoint, weight in members:
        for (layer, scaling), rank in zip(checkpoint.layout.scaled_layers(), checkpoint.layout.ranks, strict=True):
            a, b = (side.double() for side in checkpoint.matrices[layer.name])
            assert len(a) == rank
            delta = scaling * b @ a
            expected[layer.name] = expected.get(layer.name, 0) + weight * delta
            scale[layer.name] = scale.get(layer.name, 0.0) + abs(weight) * float(delta.abs().max())
    assert got.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((got[name] - delta).abs().max()) <= 2e-6 * scale[name] + 1e-30
    assert set(stacked.layout.ranks) == {stacked.config.r} == {int(stacked.config.lora_alpha)}
    assert set(stacked.layout.scalings) == {1.0}


def test_extras_of_a_stack_are_blended_and_need_the_base(tmp_path: Path) -> None:
    model = adapted(MODELS["qwen2"])
    plain = served(make_lora(MODELS["qwen2"], tmp_path / "a", target_modules=["q_proj"], bias="lora_only"))
    spec = AdapterSpec(target_modules=["v_proj"], modules_to_save=["lm_head"])
    members = [(plain, 0.5), (served(make_adapter(MODELS["qwen2"], spec, tmp_path / "b")), -0.25)]
    with pytest.raises(InvalidSelection, match="name the base model"):
        weighted_sum(members)
    stored = weighted_sum(members, model.tensor)
    assert isinstance(stored, LoRACheckpoint)
    assert (stored.config.bias, stored.config.modules_to_save) == ("lora_only", ("lm_head",))
    write_adapter(stored, tmp_path / "stored")
    present = [factors_of(checkpoint, model, f"{i}") for i, (checkpoint, _) in enumerate(members)]
    expected = token_logits(model, [PROMPT], alone(*present, weights=[0.5, -0.25]))[0]
    theirs = peft_logits(peft_reference(MODELS["qwen2"], tmp_path / "stored"), PROMPT)
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-3)


def test_what_cannot_be_stacked(tmp_path: Path) -> None:
    plain = lora(make_lora(LLAMA, tmp_path / "plain", target_modules=["q_proj"]))
    wide = lora(make_lora(tiny_model("llama", hidden_size=128), tmp_path / "wide", target_modules=["q_proj"]))
    for weights in ([], [float("nan")], [1e20]):
        with pytest.raises(InvalidSelection):
            stack_lora([(plain, weight) for weight in weights])
    with pytest.raises(ShapeMismatch, match="different base models"):
        stack_lora([(plain, 1.0), (wide, 1.0)])


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"q_proj": 9}}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_parameters_are_those_that_peft_trains(fields: dict[str, Any], tmp_path: Path) -> None:
    trained, _ = trainable_lora(LLAMA, target_modules=["q_proj", "v_proj"], **fields).get_nb_trainable_parameters()
    count = lora(make_lora(LLAMA, tmp_path / "a", target_modules=["q_proj", "v_proj"], **fields)).layout.parameters()
    assert count.total_params == trained
    assert count.other_params == (272 * 64 if "modules_to_save" in fields else 0)
    values = count.to_dict()
    assert (
        values.pop("summary")
        == f"LoRA params to-be-saved: {count.lora_params:,} || total params to-be-saved: {trained:,}"
    )
    of_lora = {"storage", "lora_params", "other_params", "total_params", "r"}
    assert {key for key, value in values.items() if value is not None} == of_lora
    assert {"vblora_params", "num_vectors", "vector_length", "topk", "index_dtype"} <= values.keys()


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(LLAMA, tmp_path_factory.mktemp("plain") / "plain", target_modules=["q_proj", "v_proj"])


def refused(path: Path) -> AdapterError:
    with pytest.raises(CheckpointError) as caught:
        read_adapter(path)
    return caught.value


VARIANTS: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "target_parameters": {"target_parameters": ["mlp.down_proj.weight"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_that_peft_writes_are_refused(variant: str, tmp_path: Path) -> None:
    path = make_lora(LLAMA, tmp_path / "adapter", target_modules=["q_proj"], **VARIANTS[variant])
    error = refused(path)
    assert (error.code, error.subject) == ("unsupported_checkpoint", variant)
    # Nor does it pass without its flag: its tensors, or its modules, betray it.
    silent = refused_when_bound(rewrite(path, tmp_path / "silent", config={variant: None}))
    assert silent.code in ("unsupported_checkpoint", "unexpected_tensor", "missing_tensor")


def refused_when_bound(path: Path) -> AdapterError:
    with pytest.raises(CheckpointError) as caught:
        check_layout(read_adapter_layout(path), adapted(LLAMA))
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("use_whatever_comes_next", True),
        ("alora_invocation_tokens", [1]),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"num_samples": 8}),
        ("megatron_config", {"a": 1}),
        ("velora_config", {"num_groups": 4}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_other_variants_are_refused_by_their_field(field: str, value: Any, plain: Path, tmp_path: Path) -> None:
    error = refused(rewrite(plain, tmp_path / "adapter", config={field: value}))
    assert (error.code, error.subject) == ("unsupported_checkpoint", field)


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_taken(value: Any, plain: Path, tmp_path: Path) -> None:
    assert lora(rewrite(plain, tmp_path / "adapter", config={"init_lora_weights": value})).config.r == 4


def test_a_pissa_adapter_that_peft_converted_is_taken(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    model = trainable_lora(LLAMA, **fields)
    initial = tmp_path / "initial"
    model.peft_config["default"].init_lora_weights = True
    trainable_lora(LLAMA, seed=9, **fields).save_pretrained(initial)
    assert refused(initial).subject == "init_lora_weights"
    model.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=str(initial))
    assert lora(tmp_path / "done").layout.ranks == (8, 8)


def test_embeddings_are_refused(tmp_path: Path) -> None:
    error = refused(make_lora(LLAMA, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"]))
    assert error.code == "unsupported_checkpoint"
    assert "embedding" in error.message


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({KEY: None}, "missing_tensor"),
        ({KEY: torch.zeros(4, 64, 3, 3)}, "unsupported_checkpoint"),
        ({KEY: torch.zeros(4)}, "shape_mismatch"),
        ({KEY: torch.zeros(0, 64)}, "shape_mismatch"),
        ({KEY: torch.zeros(5, 64)}, "shape_mismatch"),
        ({KEY: torch.zeros(4, 64, dtype=torch.int8)}, "shape_mismatch"),
        ({KEY: torch.full((4, 64), float("nan"))}, "non_finite"),
        ({KEY: torch.full((4, 64), 1e16)}, "non_finite"),
        ({KEY.replace("q_proj", "k_proj"): torch.zeros(4, 64)}, "missing_tensor"),
        ({KEY.replace("lora_A.weight", "lora_diag"): torch.zeros(4)}, "unexpected_tensor"),
        ({"base_model.model.model.norm.weight": torch.zeros(64)}, "unexpected_tensor"),
        ({"something": torch.zeros(1)}, "unexpected_tensor"),
    ],
)
def test_damaged_files_are_refused(tensors: dict[str, Tensor], code: str, plain: Path, tmp_path: Path) -> None:
    assert refused(rewrite(plain, tmp_path / "adapter", tensors=tensors)).code == code


@pytest.mark.parametrize(
    ("config", "code", "subject"),
    [
        ({"r": 0}, "bad_config", "r"),
        ({"r": 8}, "shape_mismatch", KEY),
        ({"lora_alpha": -1}, "bad_config", "lora_alpha"),
        ({"lora_alpha": "8"}, "bad_config", "lora_alpha"),
        ({"lora_alpha": 1e300}, "non_finite", KEY.replace("lora_A", "lora_B")),
        ({"use_rslora": 1}, "bad_config", "use_rslora"),
        ({"rank_pattern": {"q_proj": 0}}, "bad_config", "rank_pattern['q_proj']"),
        ({"rank_pattern": {"q_proj": 2}}, "shape_mismatch", KEY),
        ({"rank_pattern": ["q_proj"]}, "bad_config", "rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "bad_config", "rank_pattern"),
        ({"rank_pattern": {f"m{i}": 4 for i in range(10_001)}}, "bad_config", "rank_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "bad_config", "alpha_pattern['q_proj']"),
        ({"bias": "vblora_only"}, "bad_config", "bias"),
        ({"target_modules": ["q_proj"]}, "unexpected_tensor", "model.layers.0.self_attn.v_proj"),
        ({"peft_type": "ADALORA"}, "unsupported_checkpoint", "peft_type"),
        ({"peft_type": "VBLORA"}, "missing_tensor", "base_model.vblora_vector_bank"),
    ],
)
def test_configs_are_refused(config: dict[str, Any], code: str, subject: str, plain: Path, tmp_path: Path) -> None:
    error = refused(rewrite(plain, tmp_path / "adapter", config=config))
    assert (error.code, error.subject) == (code, subject)


def test_an_adapter_of_another_base_is_refused(plain: Path) -> None:
    model = adapted(tiny_model("llama", hidden_size=128))
    with pytest.raises(ShapeMismatch, match="another base"):
        check_layout(read_adapter_layout(plain), model)
    with pytest.raises(CheckpointError) as caught:
        check_layout(read_adapter_layout(plain), adapted(MODELS["gpt2"]))
    assert caught.value.code == "no_target_matched"


def test_a_selected_module_without_tensors_is_refused(plain: Path, tmp_path: Path) -> None:
    path = rewrite(plain, tmp_path / "adapter", config={"target_modules": ["q_proj", "v_proj", "k_proj"]})
    with pytest.raises(CheckpointError) as caught:
        check_layout(read_adapter_layout(path), adapted(LLAMA))
    assert caught.value.code == "missing_tensor"


def test_a_family_shares_one_layout(plain: Path, tmp_path: Path) -> None:
    other = rewrite(plain, tmp_path / "other", tensors={KEY: torch.ones(4, 64)})
    again = rewrite(plain, tmp_path / "again")
    assert read_adapter_layout(other) is read_adapter_layout(again)
