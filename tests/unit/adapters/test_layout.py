"""What the header and the config must say together, before any tensor is read."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from adapters.config import VBLoRAConfig
from adapters.errors import BadConfig, BadIndex, CheckpointError, MissingTensor, ShapeMismatch, UnexpectedTensor
from adapters.layout import BANK_KEY, AdapterLayout, extra_owner, layout_of, read_layout
from adapters.parameters import Storage
from adapters.safetensors_header import TensorSpec
from adapters.targets import LayerShape
from tests.factories import AdapterSpec, make_adapter, tiny_model

CONFIG = VBLoRAConfig(
    r=2, num_vectors=10, vector_length=8, topk=3, save_only_topk_weights=True, target_modules=("q", "v")
)
FULL = VBLoRAConfig(r=2, num_vectors=10, vector_length=8, topk=3, target_modules=("q", "v"))
MODULES = ("h.0.q", "h.0.v")

Specs = dict[str, TensorSpec]


def key(module: str, part: str) -> str:
    return f"base_model.model.{module}.vblora_logits_{part}"


def specs(*tensors: tuple[str, str, tuple[int, ...]]) -> Specs:
    return {name: TensorSpec(name, dtype, shape) for name, dtype, shape in sorted(tensors)}


def compact_specs() -> Specs:
    """q: 16 → 24, v: 16 → 8."""
    tensors = [(BANK_KEY, "F32", (10, 8))]
    for module, out_tiles in zip(MODULES, (3, 1), strict=True):
        tensors += [
            (key(module, "A_topk_indices"), "U8", (2, 2, 3)),
            (key(module, "A_topk_weights"), "F32", (2, 2, 2)),
            (key(module, "B_topk_indices"), "U8", (out_tiles, 2, 3)),
            (key(module, "B_topk_weights"), "F32", (out_tiles, 2, 2)),
        ]
    return specs(*tensors)


def full_specs() -> Specs:
    tensors = [(BANK_KEY, "BF16", (10, 8))]
    for module, out_tiles in zip(MODULES, (3, 1), strict=True):
        tensors += [(key(module, "A"), "F32", (2, 2, 10)), (key(module, "B"), "F16", (out_tiles, 2, 10))]
    return specs(*tensors)


def changed(given: Specs, name: str, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Specs:
    old = given.get(name, TensorSpec(name, "F32", ()))
    return {**given, name: TensorSpec(name, dtype or old.dtype, old.shape if shape is None else shape)}


def with_config(**fields: object) -> VBLoRAConfig:
    return VBLoRAConfig.from_dict({**CONFIG.to_dict(), **fields})


class TestLayout:
    @pytest.mark.parametrize(
        ("config", "tensors", "storage"),
        [(CONFIG, compact_specs(), Storage.TOPK), (FULL, full_specs(), Storage.LOGITS)],
        ids=["compact", "full"],
    )
    def test_keys_decide_storage_and_modules(self, config: VBLoRAConfig, tensors: Specs, storage: Storage):
        layout = layout_of(config, tensors)
        assert layout == AdapterLayout(config, storage, (LayerShape("h.0.q", 16, 24), LayerShape("h.0.v", 16, 8)))

    def test_spans_put_a_before_b_without_gaps(self):
        spans = [(layer.name, a, b) for layer, a, b in layout_of(CONFIG, compact_specs()).spans()]
        assert spans == [("h.0.q", slice(0, 4), slice(4, 10)), ("h.0.v", slice(10, 14), slice(14, 16))]

    def test_counts_without_reading_tensors(self):
        assert layout_of(CONFIG, compact_specs()).parameters().vblora_params == int(80 + 16 * 2 + 16 * 3 / 4)
        assert layout_of(FULL, full_specs()).parameters().vblora_params == 80 + 16 * 10

    def test_topk_1_has_an_empty_weights_axis(self):
        tensors = {
            name: TensorSpec(name, spec.dtype, (*spec.shape[:-1], 1 if name.endswith("indices") else 0))
            for name, spec in compact_specs().items()
            if name != BANK_KEY
        }
        assert layout_of(with_config(topk=1), {**tensors, BANK_KEY: compact_specs()[BANK_KEY]}).config.topk == 1


A_INDICES, A_WEIGHTS = key("h.0.q", "A_topk_indices"), key("h.0.q", "A_topk_weights")
B_INDICES, B_WEIGHTS = key("h.0.v", "B_topk_indices"), key("h.0.v", "B_topk_weights")

DAMAGED = {
    "bank: other rows": (ShapeMismatch, BANK_KEY, changed(compact_specs(), BANK_KEY, shape=(11, 8))),
    "bank: other length": (ShapeMismatch, BANK_KEY, changed(compact_specs(), BANK_KEY, shape=(10, 16))),
    "bank: flat": (ShapeMismatch, BANK_KEY, changed(compact_specs(), BANK_KEY, shape=(80,))),
    "bank: integers": (ShapeMismatch, BANK_KEY, changed(compact_specs(), BANK_KEY, dtype="I32")),
    "bank: float64": (ShapeMismatch, BANK_KEY, changed(compact_specs(), BANK_KEY, dtype="F64")),
    "indices: float": (BadIndex, A_INDICES, changed(compact_specs(), A_INDICES, dtype="F32")),
    "indices: bool": (BadIndex, B_INDICES, changed(compact_specs(), B_INDICES, dtype="BOOL")),
    "indices: other topk": (ShapeMismatch, A_INDICES, changed(compact_specs(), A_INDICES, shape=(2, 2, 2))),
    "indices: other r": (ShapeMismatch, A_INDICES, changed(compact_specs(), A_INDICES, shape=(4, 2, 3))),
    "indices: flat": (ShapeMismatch, B_INDICES, changed(compact_specs(), B_INDICES, shape=(6,))),
    "indices: no tile": (ShapeMismatch, B_INDICES, changed(compact_specs(), B_INDICES, shape=(0, 2, 3))),
    "weights: integers": (ShapeMismatch, A_WEIGHTS, changed(compact_specs(), A_WEIGHTS, dtype="U8")),
    "weights: with the remainder": (ShapeMismatch, A_WEIGHTS, changed(compact_specs(), A_WEIGHTS, shape=(2, 2, 3))),
    "weights: other tiles": (ShapeMismatch, B_WEIGHTS, changed(compact_specs(), B_WEIGHTS, shape=(2, 2, 2))),
    "B stored as A": (ShapeMismatch, key("h.0.q", "B_topk_indices"), changed(
        compact_specs(), key("h.0.q", "B_topk_indices"), shape=(2, 3, 3))),
    "a stranger": (UnexpectedTensor, "base_model.model.h.0.q.lora_A.weight", changed(
        compact_specs(), "base_model.model.h.0.q.lora_A.weight")),
    "a stranger outside the model": (UnexpectedTensor, "optimizer.state", changed(compact_specs(), "optimizer.state")),
    "PEFT's name of the adapter left in a key": (
        UnexpectedTensor, "base_model.vblora_vector_bank.default",
        changed(compact_specs(), "base_model.vblora_vector_bank.default")),
    "a module that the config does not name": (UnexpectedTensor, "h.0.k", {
        **compact_specs(), **{
            name.replace("h.0.v", "h.0.k"): TensorSpec(name.replace("h.0.v", "h.0.k"), spec.dtype, spec.shape)
            for name, spec in compact_specs().items() if "h.0.v" in name}}),
    "a bias that the config does not call for": (
        UnexpectedTensor, "base_model.model.h.0.q.base_layer.bias",
        changed(compact_specs(), "base_model.model.h.0.q.base_layer.bias", shape=(24,))),
    "an embedding of integers": (
        ShapeMismatch, "base_model.model.embed_tokens.weight",
        changed(compact_specs(), "base_model.model.embed_tokens.weight", dtype="I8", shape=(4, 4))),
}  # fmt: skip


@pytest.mark.parametrize(("error", "subject", "tensors"), DAMAGED.values(), ids=DAMAGED)
def test_refuses_naming_the_tensor(error: type[CheckpointError], subject: str, tensors: Specs):
    with pytest.raises(error) as refusal:
        layout_of(CONFIG, tensors)
    assert refusal.value.subject == subject
    assert subject in refusal.value.message


@pytest.mark.parametrize("name", compact_specs())
def test_every_tensor_of_a_compact_adapter_is_missed(name: str):
    with pytest.raises(MissingTensor) as refusal:
        layout_of(CONFIG, {key: spec for key, spec in compact_specs().items() if key != name})
    assert refusal.value.subject == name


@pytest.mark.parametrize("name", full_specs())
def test_every_tensor_of_a_full_adapter_is_missed(name: str):
    with pytest.raises(MissingTensor) as refusal:
        layout_of(FULL, {key: spec for key, spec in full_specs().items() if key != name})
    assert refusal.value.subject == name


def test_a_bank_alone_is_no_adapter():
    with pytest.raises(MissingTensor, match="no VB-LoRA logits"):
        layout_of(CONFIG, {BANK_KEY: compact_specs()[BANK_KEY]})


@pytest.mark.parametrize(
    ("config", "tensors"), [(FULL, compact_specs()), (CONFIG, full_specs())], ids=["compact file", "full file"]
)
def test_a_config_that_contradicts_the_storage_is_refused(config: VBLoRAConfig, tensors: Specs):
    with pytest.raises(BadConfig, match="make the config agree") as refusal:
        layout_of(config, tensors)
    assert refusal.value.subject == "save_only_topk_weights"


def test_full_logits_beside_topk_tensors_are_refused():
    mixed = {**compact_specs(), **specs((key("h.1.q", "A"), "F32", (2, 2, 10)), (key("h.1.q", "B"), "F32", (3, 2, 10)))}
    with pytest.raises(UnexpectedTensor, match="mixes"):
        layout_of(CONFIG, mixed)


EXTRAS = {
    "saved module": ({"modules_to_save": ["score"]}, "score.weight", True),
    "its bias": ({"modules_to_save": ["score"]}, "score.bias", True),
    "saved module by suffix": ({"modules_to_save": ["score"]}, "model.head.score.weight", True),
    "inside a saved module": ({"modules_to_save": ["score"]}, "score.dense.weight", True),
    "trained bias of a target": ({"bias": "vblora_only"}, "h.0.q.base_layer.bias", True),
    "any bias": ({"bias": "all"}, "h.0.ln.bias", True),
    "a target's among all": ({"bias": "all"}, "h.0.q.base_layer.bias", True),
    "embedding stored unasked": ({}, "model.embed_tokens.weight", False),
    "output embedding stored unasked": ({}, "lm_head.weight", False),
    "lm_head as a target": ({}, "lm_head.base_layer.weight", False),
    "Phi's lm_head has a bias": ({}, "lm_head.base_layer.bias", False),
}


@pytest.mark.parametrize(("fields", "name", "counted"), EXTRAS.values(), ids=EXTRAS)
def test_extras_are_taken_and_counted_as_peft_counts_them(fields: dict[str, object], name: str, counted: bool):
    tensors = changed(compact_specs(), f"base_model.model.{name}", shape=(5, 3))
    layout = layout_of(with_config(**fields), tensors)
    assert [extra.key for extra in layout.extras] == [f"base_model.model.{name}"]
    assert layout.parameters().other_params == (15 if counted else 0)


NOT_CALLED_FOR = {
    "another module": ({"modules_to_save": ["score"]}, "classifier.weight"),
    "a name that only contains it": ({"modules_to_save": ["score"]}, "scorer.weight"),
    "bias of no target": ({"bias": "vblora_only"}, "h.0.ln.bias"),
    "weight under bias all": ({"bias": "all"}, "h.0.ln.weight"),
    "weight of a target": ({"bias": "all"}, "h.0.q.base_layer.weight"),
}


@pytest.mark.parametrize(("fields", "name"), NOT_CALLED_FOR.values(), ids=NOT_CALLED_FOR)
def test_extras_that_nothing_calls_for_are_refused(fields: dict[str, object], name: str):
    tensors = changed(compact_specs(), f"base_model.model.{name}", shape=(5,))
    with pytest.raises(UnexpectedTensor) as refusal:
        layout_of(with_config(**fields), tensors)
    assert refusal.value.subject == f"base_model.model.{name}"


def test_two_names_of_one_parameter_are_refused():
    first, second = "base_model.model.lm_head.base_layer.weight", "base_model.model.lm_head.weight"
    tensors = changed(changed(compact_specs(), first, shape=(5, 3)), second, shape=(5, 3))
    with pytest.raises(UnexpectedTensor, match="two values for one parameter") as refusal:
        layout_of(with_config(modules_to_save=["lm_head"]), tensors)
    assert refusal.value.subject == second
    assert first in refusal.value.message


LN = "base_model.model.h.0.ln"
COPIES = [f"{LN}.modules_to_save.bias", f"{LN}.original_module.bias"]


def test_biases_that_peft_stores_twice_count_once():
    """What PEFT 0.21 writes with `bias: all` of a saved module: it looks into its own wrapper of it."""
    given = compact_specs()
    for name in (f"{LN}.weight", f"{LN}.bias", *COPIES, "base_model.model.mlp.modules_to_save.fc.bias"):
        given = changed(given, name, shape=(5,))
    given = changed(given, "base_model.model.mlp.fc.bias", shape=(5,))
    layout = layout_of(with_config(bias="all", modules_to_save=["ln", "mlp"]), given)
    expected = ["base_model.model.mlp.fc.bias", f"{LN}.bias", f"{LN}.weight"]
    assert sorted(extra.key for extra in layout.extras) == sorted(expected)
    assert layout.parameters().other_params == 15


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("plain", [(4,), None], ids=["of another shape", "without what it is a copy of"])
def test_what_is_no_copy_is_left_to_binding(plain: tuple[int, ...] | None, copy: str):
    """Which refuses it: no base has a module of that name."""
    given = changed(compact_specs(), copy, shape=(5,))
    if plain is not None:
        given = changed(given, f"{LN}.bias", shape=plain)
    assert copy in [extra.key for extra in layout_of(with_config(bias="all"), given).extras]


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("bias", ["none", "vblora_only"])
def test_copies_are_written_where_all_biases_are_trained_and_nowhere_else(bias: str, copy: str):
    given = changed(compact_specs(), copy, shape=(5,))
    with pytest.raises(UnexpectedTensor) as refusal:
        layout_of(with_config(bias=bias, modules_to_save=["other"]), given)
    assert refusal.value.subject == copy


def test_many_deep_names_against_many_patterns_take_little_time():
    """What is called for is found by suffixes of every name: names and lists that are both long must not multiply."""
    deep = {f"base_model.model.{'a.' * 220}{n:04}": "F32" for n in range(2000)}
    started = time.thread_time()
    with pytest.raises(UnexpectedTensor):
        layout_of(
            with_config(modules_to_save=[f"saved{n}" for n in range(100)], target_modules=None),
            {**compact_specs(), **specs(*((name, dtype, (1,)) for name, dtype in deep.items()))},
        )
    assert time.thread_time() - started < 5


def test_owner_of_an_extra():
    assert extra_owner("base_model.model.h.0.q.base_layer.bias") == "h.0.q"
    assert extra_owner("base_model.model.lm_head.weight") == "lm_head"


def test_adapters_of_a_family_share_their_layout(tmp_path: Path):
    """What differs in its config or in its header alone does not."""
    base = tiny_model("llama")
    one, other = (make_adapter(base, AdapterSpec(seed=seed), tmp_path / str(seed)) for seed in (1, 2))
    assert read_layout(one) is read_layout(other)
    smaller = make_adapter(base, AdapterSpec(seed=1, topk=1), tmp_path / "smaller")
    assert read_layout(smaller) is not read_layout(one)
    assert read_layout(smaller).config.topk == 1


def test_reads_no_tensor(tmp_path: Path):
    """A layout comes from the header alone: the same with all data zeroed."""
    path = make_adapter(tiny_model("llama"), AdapterSpec(), tmp_path)
    layout = read_layout(path)
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    weights.write_bytes(whole[:start] + b"\0" * (len(whole) - start))
    assert read_layout(path) == layout
