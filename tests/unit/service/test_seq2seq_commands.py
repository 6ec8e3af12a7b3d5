"""inspect, merge and blend on encoder-decoders: what they write is what PEFT and transformers make of the parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from adapters.errors import InvalidSelection
from service.cli import main
from service.commands import blend, merge
from service.commands.blend import WeightedDirectory
from service.commands.merge import MergeOptions
from service.engine.base_model import architecture
from service.engine.task import Task
from tests.factories import rewrite
from tests.seq2seq_factory import (
    SEQ2SEQ_ARCHS,
    Seq2SeqArch,
    Seq2SeqSpec,
    blended,
    make_seq2seq_adapter,
    peft_generated,
    peft_loaded,
    save_seq2seq,
    shared_model,
)

PROMPT = [5, 6, 7, 8, 100, 200, 3]
OUTPUT = [9, 8, 7, 6]


def merged(output: Path, base: Path, *members: tuple[Path, float]) -> Any:
    """Merges, then loads the result as its users do: without a warning of weights that are missing or left over."""
    given = tuple(WeightedDirectory(path, weight) for path, weight in members)
    assert merge.run(MergeOptions(str(base), given, output, "auto", 1 << 30, (), as_json=False)) == 0
    model, info = AutoModelForSeq2SeqLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    ids = torch.tensor([[model.config.decoder_start_token_id, *OUTPUT]])
    answer: Tensor = model(input_ids=torch.tensor([PROMPT]), decoder_input_ids=ids, use_cache=False).logits[0]
    return answer


@pytest.mark.parametrize("arch", SEQ2SEQ_ARCHS)
def test_a_merged_model_says_what_peft_says(arch: Seq2SeqArch, tmp_path: Path) -> None:
    model = shared_model(arch)
    base = save_seq2seq(model, tmp_path / "base")
    path = make_seq2seq_adapter(model, Seq2SeqSpec(seed=1), tmp_path / "a")
    result, reference = merged(tmp_path / "out", base, (path, 1.0)), peft_loaded(model, path)
    torch.testing.assert_close(logits(result), logits(reference), atol=2e-4, rtol=2e-5)
    assert peft_generated(result, PROMPT, 12) == peft_generated(reference, PROMPT, 12)
    assert not torch.allclose(logits(result), logits(model), atol=1e-2)


@pytest.mark.parametrize("arch", SEQ2SEQ_ARCHS)
def test_a_merged_blend_is_the_sum_also_where_no_task_is_named(arch: Seq2SeqArch, tmp_path: Path) -> None:
    model = shared_model(arch)
    base = save_seq2seq(model, tmp_path / "base")
    made = [make_seq2seq_adapter(model, Seq2SeqSpec(seed=i, compact=i == 0), tmp_path / f"a{i}") for i in range(2)]
    unnamed = [rewrite(path, tmp_path / f"{path.name}-unnamed", config={"task_type": None}) for path in made]
    result = merged(tmp_path / "out", base, (unnamed[0], 0.7), (unnamed[1], -0.4))
    expected = logits(blended(model, {made[0]: 0.7, made[1]: -0.4}))
    torch.testing.assert_close(logits(result), expected, atol=2e-4, rtol=2e-5)


def test_an_adapted_output_layer_is_untied_where_the_architecture_allows_it(tmp_path: Path) -> None:
    """BART's config may say so; T5's ties its embeddings whatever it says, and what is written would be lost."""
    for arch in ("bart", "t5"):
        model = shared_model(arch)  # type: ignore[arg-type]
        base = save_seq2seq(model, tmp_path / arch)
        spec = Seq2SeqSpec(seed=1, target_modules=("q_proj" if arch == "bart" else "q", "lm_head"))
        path = make_seq2seq_adapter(model, spec, tmp_path / f"{arch}-a")
        if arch == "bart":
            result = merged(tmp_path / "out", base, (path, 1.0))
            torch.testing.assert_close(logits(result), logits(peft_loaded(model, path)), atol=2e-4, rtol=2e-5)
        else:
            with pytest.raises(InvalidSelection, match="always shares"):
                merged(tmp_path / "t5-out", base, (path, 1.0))


def test_inspect_holds_an_adapter_against_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t5 = save_seq2seq(shared_model("t5"), tmp_path / "t5")
    bart = save_seq2seq(shared_model("bart"), tmp_path / "bart")
    path = make_seq2seq_adapter(shared_model("t5"), Seq2SeqSpec(seed=1), tmp_path / "a")
    assert main(["inspect", str(path), "--model", str(t5), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["vblora_params"] > 0
    assert main(["inspect", str(path), "--model", str(bart), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "no_target_matched"


def test_init_makes_an_adapter_that_peft_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_seq2seq(shared_model("t5"), tmp_path / "t5")
    command = ["init", "--model", str(base), "--r", "2", "--num-vectors", "8", "--vector-length", "8"]
    assert main([*command, "--target-modules", "q,v,wo", "--output", str(tmp_path / "fresh")]) == 0
    assert json.loads((tmp_path / "fresh" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    assert "SelfAttention.q" in str([*peft_loaded(shared_model("t5"), tmp_path / "fresh").state_dict()])
    capsys.readouterr()


@pytest.mark.parametrize("spec", [{}, {"bias": "all"}, {"modules_to_save": ("lm_head",)}])
def test_a_blend_is_an_adapter_that_peft_loads(spec: dict[str, Any], tmp_path: Path) -> None:
    model = shared_model("bart")
    base = save_seq2seq(model, tmp_path / "base")
    made = [make_seq2seq_adapter(model, Seq2SeqSpec(seed=i, **spec), tmp_path / f"a{i}") for i in range(2)]
    members = [WeightedDirectory(made[0], 0.7), WeightedDirectory(made[1], 0.3)]
    assert blend.run(members, output=tmp_path / "blend", model=str(base), as_json=False) == 0
    assert json.loads((tmp_path / "blend" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    loaded = peft_loaded(model, tmp_path / "blend")
    assert isinstance(loaded, PeftModel)
    if not spec:
        expected = logits(blended(model, {made[0]: 0.7, made[1]: 0.3}))
        torch.testing.assert_close(logits(loaded), expected, atol=2e-4, rtol=2e-5)
    result = merged(tmp_path / "out", base, (made[0], 0.7), (made[1], 0.3))
    torch.testing.assert_close(logits(loaded), logits(result), atol=2e-4, rtol=2e-5)


def test_architectures_are_made_by_task_or_by_what_the_config_says(tmp_path: Path) -> None:
    base = save_seq2seq(shared_model("bart"), tmp_path / "base")
    for task in (Task.SEQ2SEQ, Task.GENERATE):
        made = architecture(str(base), task)
        assert type(made.model.model).__name__ == "BartForConditionalGeneration"
        assert made.prefix == "model"
