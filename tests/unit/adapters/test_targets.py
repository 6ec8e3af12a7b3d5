"""Names are matched as PEFT matches them, on a grid and on generated names, and in bounded time."""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import VBLoRAConfig as PeftConfig
from peft import get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.tuners.vblora import VBLoRALayer
from peft.utils import TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.config import VBLoRAConfig
from adapters.errors import AdapterError, BadConfig, NoTargetMatched, UnexpectedTensor
from adapters.name_patterns import LONGEST_REGEX, REGEX_TIMEOUT_S
from adapters.targets import (
    DEFAULT_TARGETS,
    BaseModules,
    LayerShape,
    TargetMatcher,
    adaptable_shape,
    check_targets,
)
from tests.factories import Arch, tiny_model
from tests.unit.adapters.support import base_modules

ARCHS = get_args(Arch)


def config(**fields: Any) -> VBLoRAConfig:
    return VBLoRAConfig.from_dict({"peft_type": "VBLORA", **fields})


def assert_same_as_peft(names: list[str], **fields: Any) -> None:
    ours, theirs = config(**fields), PeftConfig(**fields)
    matcher = TargetMatcher(ours, ours.target_modules)
    matched = [name for name in names if matcher.matches(name)]
    assert matched == [name for name in names if check_target_module_exists(theirs, name)], fields


NAMES = [
    "",
    "q",
    "lm_head",
    "score",
    "model.layers.0",
    "model.layers.0.q",
    "model.layers.1.attn.q",
    "model.layers.1.attn.q_norm",
    "model.layers.01.attn.q",
    "model.layers.10.attn.q",
    "model.layers.1.experts.0.q",
    "model.layers.0.experts.1.q",
    "model.encoder.layers.2.q",
    "layers.1.q",
    "transformer.h.1.attn.q",
    "transformer.h.1.attn.bq",
    "model.1.q",
    "model.layers.q",
    "score.dense.q",
    "model.score.q",
    "model.layers.1.underscore.q",
    "h.3.0.q",
]
TARGETS: list[Any] = [
    [],
    ["q"],
    ["attn.q", "lm_head"],
    ["model.layers.1.attn.q"],
    ["model.layers.10.attn.q", "layers.1.q"],
    ["layers.0", "q_norm"],
    r".*\.q",
    r".*layers\.(?!1\.).*\.q",
    r".*(?<=attn)\.q(_norm)?",
    r"(?i).*\.Q",
    r"model\.layers\.\d+\.attn\.(?P<side>q|k)",
    r"(?:^|.*\.)q$",
    r"q|lm_head",
    r"[a-z.]*\d+[^\d]*",
    "",
]
EXCLUDED: list[Any] = [None, [], ["layers.1.attn.q"], ["lm_head", "model.1.q"], "", r".*layers\.1\..*", r".*experts.*"]
LAYERS: list[Any] = [
    {},
    *({"layers_to_transform": layers} for layers in (0, 1, [1], [0, 10], [], -1)),
    *({"layers_to_transform": [1, 3], "layers_pattern": pattern} for pattern in ("layers", ["h", "layers"], "", [])),
    {"layers_to_transform": [], "layers_pattern": "h"},
    {"layers_to_transform": 1, "layers_pattern": r"enc\w+\.layers"},
    {"layers_to_transform": 1, "layers_pattern": "layers|h"},
    {"layers_to_transform": 1, "layers_pattern": ["experts", "layers"]},
]
SAVED: list[Any] = [None, ["score"], ["lm_head", "attn"], [r"sc.re", "experts"], ["score|lm_head"]]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_same_modules_as_peft_on_a_grid(targets: Any):
    for excluded, layers, saved in itertools.product(EXCLUDED, LAYERS, SAVED):
        assert_same_as_peft(NAMES, target_modules=targets, exclude_modules=excluded, modules_to_save=saved, **layers)


words = st.sampled_from(["model", "layers", "h", "experts", "attn", "q", "k", "qk", "lm_head", "0", "1", "2", "12"])
names = st.lists(words, min_size=1, max_size=6).map(".".join)
patterns = st.lists(
    st.sampled_from([".*", r"\.", "layers", "q", "(q|k)", r"\d+", "(?!0)", "(?=q)", "[0-1]", "h?", "attn", "(?:1|2)"]),
    min_size=1,
    max_size=6,
).map("".join)
name_lists = st.lists(names, max_size=3)


@settings(max_examples=300, deadline=None)
@given(
    module_names=st.lists(names, min_size=1, max_size=12),
    targets=name_lists | patterns,
    excluded=st.none() | name_lists | patterns,
    saved=st.none() | st.lists(words, max_size=2),
    layers=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 12), max_size=3),
    pattern=st.none() | st.sampled_from(["layers", "h", "experts"]) | st.lists(words, max_size=2),
)
def test_same_modules_as_peft_on_generated_names(
    module_names: list[str], targets: Any, excluded: Any, saved: Any, layers: Any, pattern: Any
):
    assert_same_as_peft(
        module_names,
        target_modules=targets,
        exclude_modules=excluded,
        modules_to_save=saved,
        layers_to_transform=layers,
        layers_pattern=None if layers is None else pattern,
    )


def wrapped_by_peft(model: PreTrainedModel, **fields: Any) -> set[str]:
    peft_model = get_peft_model(copy.deepcopy(model), PeftConfig(vector_length=16, num_vectors=8, **fields))
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, module in peft_model.named_modules() if isinstance(module, VBLoRALayer)}


SELECTIONS: dict[str, dict[str, Any]] = {
    "null": {},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, any case": {"target_modules": "ALL-Linear"},
    "all-linear but": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "c_attn"]},
    "all-linear, lm_head saved": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "list": {"target_modules": ["q_proj", "fc1", "c_attn"]},
    "list, one layer": {"target_modules": ["q_proj", "c_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.1\..*(_proj|fc2|c_fc)"},
    "lm_head": {"target_modules": ["lm_head"]},
    "null, one layer": {"layers_to_transform": 0},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fields", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("arch", ARCHS)
def test_selects_the_modules_that_peft_wraps(arch: Arch, fields: dict[str, Any]):
    model = tiny_model(arch)
    selected = base_modules(model).selected_by(config(**fields))
    assert {layer.name for layer in selected} == wrapped_by_peft(model, **fields)
    for layer in selected:
        module = model.get_submodule(layer.name)
        assert (layer.in_features, layer.out_features) == adaptable_shape(module)


def test_the_defaults_are_pefts():
    theirs = {
        model_type: targets if isinstance(targets, str) else tuple(targets)
        for model_type, targets in TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING.items()
    }
    assert theirs == DEFAULT_TARGETS


class TestShapes:
    def test_linear_and_conv1d_are_adaptable(self):
        assert adaptable_shape(nn.Linear(3, 5)) == (3, 5)
        assert adaptable_shape(Conv1D(5, 3)) == (3, 5)

    @pytest.mark.parametrize("module", [nn.Embedding(3, 5), nn.LayerNorm(3), nn.Conv1d(3, 5, 1), nn.Sequential()])
    def test_nothing_else_is(self, module: nn.Module):
        assert adaptable_shape(module) is None


class TestSelectionRefusals:
    BASE = base_modules(tiny_model("llama"))

    def refusal(self, **fields: Any) -> NoTargetMatched:
        with pytest.raises(NoTargetMatched) as refusal:
            self.BASE.selected_by(config(**fields))
        return refusal.value

    def test_nothing_matched_names_what_is_there(self):
        error = self.refusal(target_modules=["c_attn", "query"])
        assert error.subject == "target_modules"
        for word in ("llama", "'c_attn'", "'query'", "'q_proj'", "'down_proj'"):
            assert word in error.message

    def test_everything_excluded(self):
        assert self.refusal(target_modules="all-linear", exclude_modules=".*").subject == "target_modules"

    @pytest.mark.parametrize("target", ["embed_tokens", "norm", "self_attn"])
    def test_other_kinds_of_modules(self, target: str):
        error = self.refusal(target_modules=["q_proj", target])
        assert error.subject is not None
        assert error.subject.endswith(target)
        assert "Linear and Conv1D" in error.message

    def test_null_on_an_architecture_without_a_default(self):
        unknown = BaseModules.of(nn.Sequential(nn.Linear(4, 4)), model_type="my_model")
        with pytest.raises(NoTargetMatched, match="no default for 'my_model'"):
            unknown.selected_by(config())


class TestCheckTargets:
    def test_null_and_all_linear_name_nothing(self):
        for targets in (None, "all-linear"):
            check_targets(config(target_modules=targets), ["anything.at.all"])

    def test_a_module_that_is_not_named_is_unexpected(self):
        with pytest.raises(UnexpectedTensor) as refusal:
            check_targets(config(target_modules=["q"]), ["h.0.q", "h.0.k"])
        assert refusal.value.subject == "h.0.k"

    def test_numbers_of_layers_may_be_of_any_length(self):
        endless = f"layers.{'1' * 5000}.q"  # more digits than int() takes
        with pytest.raises(UnexpectedTensor):
            check_targets(config(target_modules=["q"], layers_to_transform=1), [endless])

    def test_a_layers_pattern_without_a_number_matches_nothing(self):
        fields = {"target_modules": ["layers"], "layers_to_transform": 1, "layers_pattern": "layers|x"}
        assert_same_as_peft(["model.layers"], **fields)
        with pytest.raises(UnexpectedTensor):
            check_targets(config(**fields), ["model.layers"])


FIELDS = ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern"]


def with_pattern(field: str, pattern: str) -> VBLoRAConfig:
    fields = {"target_modules": ["q"], "layers_to_transform": [0]}
    return config(**{**fields, field: [pattern] if field in ("modules_to_save", "layers_pattern") else pattern})


class TestHostilePatterns:
    """Measured in the processor time of this thread: a busy machine must not fail these."""

    @pytest.mark.parametrize("field", FIELDS)
    def test_catastrophic_backtracking_ends(self, field: str):
        name = "a" * 60 + ".0.q"
        with pytest.raises(BadConfig, match="too long to match") as refusal:
            self.seconds(with_pattern(field, "(?:a|a)+!"), [name])
        assert refusal.value.subject == field

    def test_a_little_on_each_of_many_names_ends_too(self):
        """Each name takes some hundredths of a second and matches: no single one is too slow."""
        many = [f"{'a' * 18}{n:04}" for n in range(2500)]
        started = time.thread_time()
        with pytest.raises(BadConfig, match="too long to match"):
            check_targets(config(target_modules="(?!(?:a|a)+!).*"), many)
        assert time.thread_time() - started < 4 * REGEX_TIMEOUT_S

    def test_many_patterns_share_the_time(self):
        saved = [f"(?:a|a)+!{n}" for n in range(1000)]
        started = time.thread_time()
        with pytest.raises(BadConfig, match="too long to match"):
            check_targets(config(target_modules=".*", modules_to_save=saved), ["a" * 16] * 100)
        assert time.thread_time() - started < 3 + 4 * REGEX_TIMEOUT_S  # compiling a thousand takes most of it

    def test_an_honest_pattern_is_far_from_the_limit(self):
        many = [f"model.layers.{n}.self_attn.q_proj" for n in range(2500)]
        honest = config(target_modules=r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|up|down|gate)_proj")
        assert self.seconds(honest, many) < REGEX_TIMEOUT_S / 4

    @pytest.mark.parametrize("field", FIELDS)
    def test_too_long_to_compile(self, field: str):
        with pytest.raises(BadConfig, match="too long") as refusal:
            check_targets(with_pattern(field, "a" * (LONGEST_REGEX + 1)), ["a.0.q"])
        assert refusal.value.subject == field

    @pytest.mark.parametrize("field", FIELDS)
    @pytest.mark.parametrize("pattern", ["(", "a{2,1}", "[z-a]", r"(?P<idx>\d+", "(?<=a*)(", "(" * 3000])
    def test_invalid_ones_are_bad_config(self, field: str, pattern: str):
        with pytest.raises(BadConfig) as refusal:
            check_targets(with_pattern(field, pattern), ["a.0.q"])
        assert refusal.value.subject == field

    @staticmethod
    def seconds(settings: VBLoRAConfig, module_names: list[str]) -> float:
        started = time.thread_time()
        check_targets(settings, module_names)
        return time.thread_time() - started


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from(FIELDS), pattern=st.text("ab01.*+?()[]{}|^$\\dwsP<>=!:-,idx", max_size=16))
def test_any_pattern_is_taken_or_bad_config(field: str, pattern: str):
    try:
        check_targets(with_pattern(field, pattern), ["a.0.q", "a.b", "0.1.q"])
    except AdapterError as error:
        assert isinstance(error, (BadConfig, UnexpectedTensor))  # noqa: PT017


def test_layers_of_the_base_in_its_own_order():
    layers = list(base_modules(tiny_model("gpt2")).layers.values())
    assert layers[0] == LayerShape("transformer.h.0.attn.c_attn", 64, 192)
    assert layers[-1] == LayerShape("lm_head", 64, 272)
