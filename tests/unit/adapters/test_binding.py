"""Which adapters a base model takes, and how it says no."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters.binding import BaseIdentity, check_base_name, check_layout, check_range, replaced_parameters
from adapters.checkpoint import read_checkpoint
from adapters.errors import (
    BaseModelMismatch,
    CheckpointError,
    MissingTensor,
    NonFinite,
    NoTargetMatched,
    ShapeMismatch,
    UnexpectedTensor,
)
from adapters.layers import AdaptedModel
from adapters.merge import Merger
from tests.factories import WEIGHTS_FILE, AdapterSpec, make_adapter, rewrite, tiny_model
from tests.unit.adapters.support import adapted, factors

LLAMA = tiny_model("llama")


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    return adapted(LLAMA)


def bind(path: Path, model: AdaptedModel) -> None:
    checkpoint = read_checkpoint(path)
    check_layout(checkpoint.layout, model)
    return replaced_parameters(checkpoint.extras, model.tensor)


def rename(source: Path, path: Path, old: str, new: str, **config: object) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return rewrite(source, path, change, config)


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(),
        AdapterSpec(compact=False, target_modules="all-linear"),
        AdapterSpec(target_modules=r".*layers\.1\..*_proj"),
        AdapterSpec(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"),
        AdapterSpec(target_modules=["v_proj", "lm_head"]),
        AdapterSpec(save_embedding_layers=True),
    ],
    ids=["default", "all-linear", "regex", "one layer", "lm_head", "embeddings unasked"],
)
def test_adapters_of_this_base_bind(spec: AdapterSpec, model: AdaptedModel, tmp_path: Path):
    bind(make_adapter(LLAMA, spec, tmp_path), model)


@pytest.mark.parametrize("fields", [{}, {"layers_to_transform": [2]}], ids=["all layers", "one layer"])
def test_a_list_of_targets_that_peft_has_shortened_binds(fields: dict[str, list[int]], tmp_path: Path):
    """From 20 modules on, PEFT saves the shortest suffixes instead of full names."""
    deep = tiny_model("llama", num_hidden_layers=4)
    path = make_adapter(deep, AdapterSpec(target_modules="all-linear", **fields), tmp_path)
    targets = read_checkpoint(path).config.target_modules
    assert targets is not None
    assert "q_proj" in targets
    bind(path, adapted(deep))


class TestRefusals:
    def refusal(self, error: type[CheckpointError], path: Path, model: AdaptedModel) -> CheckpointError:
        with pytest.raises(error) as refusal:
            bind(path, model)
        assert type(refusal.value) is error
        return refusal.value

    def test_nothing_matched_names_what_is_there(self, model: AdaptedModel, tmp_path: Path):
        path = make_adapter(tiny_model("gpt2"), AdapterSpec(target_modules=["c_attn"]), tmp_path)
        error = self.refusal(NoTargetMatched, path, model)
        assert error.subject == "target_modules"
        for word in ("transformer.h.0.attn.c_attn", "llama", "q_proj", "lm_head"):
            assert word in error.message

    def test_the_base_lacks_a_module(self, model: AdaptedModel, tmp_path: Path):
        path = make_adapter(tiny_model("llama", num_hidden_layers=3), AdapterSpec(), tmp_path)
        assert self.refusal(UnexpectedTensor, path, model).subject == "model.layers.2.self_attn.q_proj"

    def test_a_layer_that_the_config_selects_is_not_in_the_file(self, model: AdaptedModel, tmp_path: Path):
        path = make_adapter(tiny_model("llama", num_hidden_layers=1), AdapterSpec(), tmp_path)
        error = self.refusal(MissingTensor, path, model)
        assert error.subject == "model.layers.1.self_attn.q_proj"
        assert "2 module(s)" in error.message

    def test_a_module_that_is_no_linear_layer(self, model: AdaptedModel, tmp_path: Path):
        source = make_adapter(LLAMA, AdapterSpec(target_modules=["lm_head"]), tmp_path / "source")
        path = rename(source, tmp_path / "other", "lm_head", "model.embed_tokens", target_modules=["embed_tokens"])
        error = self.refusal(NoTargetMatched, path, model)
        assert error.subject == "model.embed_tokens"
        assert "Embedding" in error.message

    def test_the_config_selects_more_than_linear_layers(self, model: AdaptedModel, tmp_path: Path):
        source = make_adapter(LLAMA, AdapterSpec(), tmp_path / "source")
        path = rewrite(source, tmp_path / "other", None, {"target_modules": ["q_proj", "v_proj", "embed_tokens"]})
        assert self.refusal(NoTargetMatched, path, model).subject == "model.embed_tokens"

    def test_other_shapes(self, model: AdaptedModel, tmp_path: Path):
        path = make_adapter(tiny_model("llama", hidden_size=128), AdapterSpec(target_modules=["o_proj"]), tmp_path)
        error = self.refusal(ShapeMismatch, path, model)
        assert error.subject == "model.layers.0.self_attn.o_proj"
        assert "128→128" in error.message
        assert "64→64" in error.message

    def test_vector_length_does_not_divide(self, model: AdaptedModel, tmp_path: Path):
        wide = tiny_model("llama", hidden_size=96)
        path = make_adapter(wide, AdapterSpec(target_modules=["o_proj"], vector_length=48), tmp_path)
        error = self.refusal(ShapeMismatch, path, model)
        assert "vector_length 48 does not divide" in error.message

    def test_saved_module_of_another_shape(self, model: AdaptedModel, tmp_path: Path):
        other = tiny_model("llama", vocab_size=304)
        path = make_adapter(other, AdapterSpec(save_embedding_layers=True), tmp_path)
        assert "vocabulary" in self.refusal(ShapeMismatch, path, model).message

    def test_saved_module_that_the_base_lacks(self, model: AdaptedModel, tmp_path: Path):
        source = make_adapter(LLAMA, AdapterSpec(), tmp_path / "source")
        key = "base_model.model.score.weight"
        path = rewrite(source, tmp_path / "scored", {key: torch.zeros(2, 64)}, {"modules_to_save": ["score"]})
        assert self.refusal(UnexpectedTensor, path, model).subject == key

    @pytest.mark.parametrize("owner", ["model.layers.7.self_attn.q_proj", "model.forward", "a.b", "model.config"])
    def test_extras_of_nothing(self, owner: str, model: AdaptedModel, tmp_path: Path):
        source = make_adapter(LLAMA, AdapterSpec(), tmp_path / "source")
        key = f"base_model.model.{owner}.bias"
        path = rewrite(source, tmp_path / "other", {key: torch.zeros(2)}, {"bias": "all"})
        assert self.refusal(UnexpectedTensor, path, model).subject == key


class TestExtras:
    @pytest.mark.parametrize(
        ("arch", "spec", "trained"),
        [
            ("llama", AdapterSpec(modules_to_save=["lm_head"]), "lm_head.weight"),
            ("qwen2", AdapterSpec(bias="vblora_only"), "q_proj.base_layer.bias"),
            ("gpt2", AdapterSpec(bias="all"), "ln_1.bias"),
        ],
        ids=["saved module", "target biases", "all biases"],
    )
    def test_trained_ones_are_refused_and_untrained_ones_taken(
        self, arch: str, spec: AdapterSpec, trained: str, tmp_path: Path
    ):
        base = tiny_model(arch)  # type: ignore[arg-type]
        source = make_adapter(base, spec, tmp_path / "trained")
        replaced = {f"{module}.{a}" for module, own in bind(source, adapted(base)).items() for a in own}
        stored = {key.replace(".base_layer", "") for key in load_file(source / WEIGHTS_FILE) if "vblora" not in key}
        assert {f"base_model.model.{name}" for name in replaced} == stored
        assert any(key.endswith(trained) for key in load_file(source / WEIGHTS_FILE))

        def untrain(tensors: dict[str, Tensor]) -> None:
            own = base.state_dict()
            for key in [key for key in tensors if "vblora" not in key]:
                tensors[key] = own[key.removeprefix("base_model.model.").replace(".base_layer", "")]

        assert not bind(rewrite(source, tmp_path / "untrained", untrain), adapted(base))

    def test_the_bases_own_in_another_dtype_are_taken(self, tmp_path: Path):
        path = make_adapter(LLAMA, AdapterSpec(target_modules=["q_proj", "lm_head"]), tmp_path)
        bind(path, adapted(LLAMA, torch.bfloat16))

    def test_what_the_bases_dtype_cannot_hold_is_refused(self, tmp_path: Path):
        source = make_adapter(LLAMA, AdapterSpec(modules_to_save=["lm_head"]), tmp_path / "source")
        key = "base_model.model.lm_head.weight"
        large = rewrite(source, tmp_path / "large", {key: torch.full((272, 64), 1e5)})
        extras = read_checkpoint(large).extras
        for dtype in (torch.float32, torch.bfloat16):
            check_range(extras, adapted(LLAMA, dtype))
        with pytest.raises(NonFinite, match="float16") as refusal:
            check_range(extras, adapted(LLAMA, torch.float16))
        assert refusal.value.subject == key

    def test_what_is_folded_at_the_moment_does_not_matter(self, tmp_path: Path):
        """The stored lm_head is compared with the base's own, not with one that another adapter is folded into."""
        path = make_adapter(LLAMA, AdapterSpec(target_modules=["q_proj", "lm_head"]), tmp_path)
        model = adapted(LLAMA)
        Merger(model).fold([(factors(path), 1.0)])
        bind(path, model)


class TestBaseName:
    HUB = BaseIdentity(frozenset({"org/base", "alias/of-it"}))
    LOCAL = BaseIdentity(frozenset({"alias/of-it"}), folder_name="base-7b")

    @pytest.mark.parametrize("named", ["org/base", "ORG/Base", "alias/of-it"])
    def test_its_own_names_are_taken(self, named: str):
        assert check_base_name(named, self.HUB) is None

    def test_another_hub_id_is_refused(self):
        with pytest.raises(BaseModelMismatch) as refusal:
            check_base_name("org/other", self.HUB)
        assert refusal.value.subject == "base_model_name_or_path"
        for word in ("org/other", "org/base", "allow_base_mismatch"):
            assert word in refusal.value.message

    def test_a_local_server_says_so(self):
        with pytest.raises(BaseModelMismatch, match="a local model"):
            check_base_name("org/other", BaseIdentity(frozenset(), "elsewhere"))

    @pytest.mark.parametrize("named", ["/data/models/llama", "./base", "base", "a/b/c", "C:\\models\\base", "..", ""])
    def test_paths_prove_nothing(self, named: str):
        warning = check_base_name(named, self.HUB)
        assert warning is not None
        assert repr(named) in warning

    def test_no_name_proves_nothing(self):
        assert "names no base" in (check_base_name(None, self.HUB) or "")

    def test_a_folder_of_that_name_is_taken_with_a_warning(self):
        assert "folder" in (check_base_name("org/Base-7B", self.LOCAL) or "")
        with pytest.raises(BaseModelMismatch):
            check_base_name("org/base-13b", self.LOCAL)
