"""The demo's kept files: small, of the promised shapes, and without a trace of the machine that made them."""

import json
import re
from math import prod
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import service.demo
from service.demo.styles import PROMPTS, STYLES

ASSETS = Path(service.demo.__file__).parent / "assets"
ADAPTERS = sorted(path.name for path in (ASSETS / "adapters").iterdir())
CARD: dict[str, Any] = json.loads((ASSETS / "card.json").read_text())
LARGEST_TOTAL = 8 * 1024 * 1024
LARGEST_ADAPTER = 250 * 1024


def slices(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's dtype and shape, from the file's header alone."""
    with safe_open(path, framework="pt") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}


def test_all_files_together_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= LARGEST_TOTAL


def test_the_base_is_float16_and_of_the_size_on_its_card() -> None:
    tensors = slices(ASSETS / "base" / "model.safetensors")
    assert {dtype for dtype, _ in tensors.values()} == {"F16"}
    parameters = sum(prod(shape) for _, shape in tensors.values())
    assert parameters == CARD["base"]["parameters"]
    assert 3_000_000 <= parameters <= 3_500_000


def test_every_style_has_its_adapter_and_card() -> None:
    assert set(ADAPTERS) == set(STYLES) == set(CARD["adapters"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_compact_vblora_in_float32(name: str) -> None:
    config = json.loads((ASSETS / "adapters" / name / "adapter_config.json").read_text())
    tensors = slices(ASSETS / "adapters" / name / "adapter_model.safetensors")
    card = CARD["adapters"][name]
    bank = tensors.pop("base_model.vblora_vector_bank")
    assert bank == ("F32", (card["num_vectors"], card["vector_length"]))
    assert config["peft_type"] == "VBLORA"
    assert config["save_only_topk_weights"] is True
    assert config["base_model_name_or_path"] == "vblora-demo-base"
    assert all(config[field] == card[field] for field in ("r", "num_vectors", "vector_length", "topk"))
    assert config["target_modules"] == sorted(card["targets"])
    for tensor, (dtype, shape) in tensors.items():
        if tensor.endswith("_topk_weights"):
            assert (dtype, shape[-1]) == ("F32", card["topk"] - 1)
        else:
            assert tensor.endswith("_topk_indices")
            assert (dtype, shape[-1]) == ("U8" if card["num_vectors"] < 256 else "I16", card["topk"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_holds_probabilities(name: str) -> None:
    path = ASSETS / "adapters" / name / "adapter_model.safetensors"
    assert path.stat().st_size <= LARGEST_ADAPTER
    with safe_open(path, framework="pt") as file:
        for tensor in file.keys():  # noqa: SIM118
            if tensor.endswith("_topk_weights"):
                weights = file.get_tensor(tensor)
                assert (weights >= 0).all()
                assert (weights.sum(-1) <= 1).all()


def test_adapters_differ_in_shape() -> None:
    shapes = {
        (card["r"], card["num_vectors"], card["vector_length"], card["topk"], *card["targets"])
        for card in CARD["adapters"].values()
    }
    assert len(shapes) == len(ADAPTERS)


def test_no_file_names_a_path_of_a_machine() -> None:
    for path in ASSETS.rglob("*"):
        if path.suffix in {".json", ".jinja", ".md"} and path.name != "tokenizer.json":
            assert not re.search(r"(?<![\w.\"])/(home|root|tmp|work|usr|opt|Users|mnt)\b", path.read_text()), path
            assert not re.search(r'"(/|[A-Z]:\\)[^"]*"', path.read_text()), path


@pytest.mark.parametrize("name", ["base", *ADAPTERS])
def test_the_card_shows_the_wide_margin(name: str) -> None:
    thresholds = CARD["thresholds"]
    for style, score in CARD["scores"][name].items():
        if style == name:
            assert score >= thresholds["own_style_at_least"]
        else:
            assert score <= thresholds["other_styles_at_most"]


def test_the_card_is_measured_on_the_prompts_that_are_kept() -> None:
    assert set(PROMPTS) <= set(CARD["samples"]["base"])


def test_the_blend_shows_both_of_its_styles() -> None:
    names = [adapter["name"] for adapter in CARD["blend"]["adapters"]]
    assert len(names) == 2
    assert all(CARD["blend"]["scores"][name] >= 0.6 for name in names)
