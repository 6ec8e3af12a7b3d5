"""`vblora-serve merge` and `inspect` of adapters that classify or embed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from service.commands import CommandError, blend, inspect, merge
from service.commands.blend import WeightedDirectory
from service.commands.merge import MergeOptions
from tests.pooling_factory import (
    POOL_ARCHS,
    HeadSpec,
    PoolArch,
    make_pool_adapter,
    peft_loaded,
    peft_scores,
    save_pool_model,
    tiny_classifier,
    tiny_encoder,
)

TEXT = [0, 30, 31, 40, 2]


def merged(output: Path, base: Path, *members: tuple[Path, float], kind: Any = None) -> PreTrainedModel:
    """Merges, then loads the result as its users do: without a warning of weights that are missing or left over."""
    given = tuple(WeightedDirectory(path, weight) for path, weight in members)
    assert merge.run(MergeOptions(str(base), given, output, "auto", 1 << 30, (), as_json=False)) == 0
    model, info = (kind or AutoModelForSequenceClassification).from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    loaded: PreTrainedModel = model.eval()
    return loaded


@torch.inference_mode()
def scores(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([TEXT])).logits[0]
    return logits


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("arch", POOL_ARCHS)
def test_a_classifier_has_the_adapters_labels(arch: PoolArch, headless: bool, tmp_path: Path) -> None:
    model = tiny_classifier(arch)
    base = save_pool_model(model.base_model if headless else model, arch, tmp_path / "base")
    adapter = make_pool_adapter(model, HeadSpec(3, seed=4), tmp_path / "a")
    (adapter / "labels.json").write_text('["bad", "fair", "good"]')
    result = merged(tmp_path / "out", base, (adapter, 1.0))
    assert result.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert result.config.architectures == [type(model).__name__]
    torch.testing.assert_close(scores(result), peft_scores(model, adapter, 3, TEXT), atol=2e-5, rtol=1e-5)


def test_a_blend_of_heads(tmp_path: Path) -> None:
    model = tiny_classifier("bert")
    base = save_pool_model(model, "bert", tmp_path / "base")
    one, two = (make_pool_adapter(model, HeadSpec(3, seed=s), tmp_path / f"a{s}") for s in (1, 2))
    result = merged(tmp_path / "out", base, (one, 0.5), (two, 0.25))
    heads = [peft_loaded(model, path, 3).base_model.model.classifier.modules_to_save["default"] for path in (one, two)]
    expected = 0.5 * heads[0].weight + 0.25 * heads[1].weight
    torch.testing.assert_close(result.classifier.weight, expected, atol=1e-6, rtol=0)
    other = make_pool_adapter(model, HeadSpec(4), tmp_path / "other")
    with pytest.raises(CommandError, match="3 and 4 labels"):
        merged(tmp_path / "out2", base, (one, 0.5), (other, 0.5))
    assert not (tmp_path / "out2").exists()


def test_an_encoder(tmp_path: Path) -> None:
    model = tiny_encoder("bert")
    base = save_pool_model(model, "bert", tmp_path / "base")
    (base / "modules.json").write_text("[]")
    adapter = make_pool_adapter(model, HeadSpec(None, seed=4), tmp_path / "a")
    result = merged(tmp_path / "out", base, (adapter, 1.0), kind=AutoModel)
    assert (tmp_path / "out" / "modules.json").is_file()
    with torch.inference_mode():
        states = result(input_ids=torch.tensor([TEXT])).last_hidden_state
        expected = peft_loaded(model, adapter, None)(input_ids=torch.tensor([TEXT])).last_hidden_state
    torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-5)


def test_adapters_of_different_tasks(tmp_path: Path) -> None:
    model = tiny_classifier("bert")
    base = save_pool_model(model, "bert", tmp_path / "base")
    one = make_pool_adapter(model, HeadSpec(2), tmp_path / "one")
    other = make_pool_adapter(tiny_encoder("bert"), HeadSpec(None), tmp_path / "other")
    with pytest.raises(CommandError, match="different tasks"):
        merged(tmp_path / "out", base, (one, 1.0), (other, 1.0))


@pytest.mark.parametrize("labels", [3, None])
def test_inspect_holds_an_adapter_against_the_base_of_its_task(
    labels: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_classifier("bert") if labels else tiny_encoder("bert")
    base = save_pool_model(tiny_encoder("bert"), "bert", tmp_path / "base")
    adapter = make_pool_adapter(model, HeadSpec(labels), tmp_path / "a")
    assert inspect.run(adapter, model=str(base), as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    head = 3 * 32 + 3 if labels else 0
    assert found["parameters"]["other_params"] == head
    assert ("base_model.model.classifier.weight" in found["extras"]) is (labels is not None)


@pytest.mark.parametrize("labels", [2, 3])
def test_blend_makes_one_adapter_of_heads(labels: int, tmp_path: Path) -> None:
    """That merges to the same model as its members do."""
    model = tiny_classifier("bert")
    base = save_pool_model(model, "bert", tmp_path / "base")
    members = [(make_pool_adapter(model, HeadSpec(labels, seed=s), tmp_path / f"a{s}"), 0.3 * s) for s in (1, 2)]
    given = [WeightedDirectory(path, weight) for path, weight in members]
    assert blend.run(given, output=tmp_path / "blend", model=str(base), as_json=False) == 0
    one, other = merged(tmp_path / "one", base, (tmp_path / "blend", 1.0)), merged(tmp_path / "other", base, *members)
    torch.testing.assert_close(scores(one), scores(other), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(one.classifier.weight, other.classifier.weight, atol=1e-6, rtol=0)
