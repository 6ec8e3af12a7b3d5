"""PEFT loads what we write, and computes what we compute."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from adapters import export
from adapters.checkpoint import LogitsCheckpoint, TopKCheckpoint, read_checkpoint
from adapters.config import VBLoRAConfig
from adapters.export import write_adapter
from tests.factories import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterSpec,
    make_adapter,
    peft_logits,
    peft_reference,
    rewrite,
    tiny_model,
)
from tests.unit.adapters.support import BANK, PROMPT, adapted, alone, base_modules, compact, factors, token_logits

MODEL = tiny_model("llama")


def written(checkpoint: TopKCheckpoint | LogitsCheckpoint, path: Path) -> Path:
    write_adapter(checkpoint, path)
    return path


def assert_peft_agrees(path: Path) -> Tensor:
    theirs = peft_logits(peft_reference(MODEL, path), PROMPT)
    ours = token_logits(adapted(MODEL), [PROMPT], alone(factors(path)))[0]
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    return theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored_compact", [True, False], ids=["compact", "full"])
def test_rewritten_adapters_stay_what_they_were(stored_compact: bool, dtype: torch.dtype, tmp_path: Path):
    """Also 16-bit compact ones, which PEFT cannot load as it wrote them."""
    spec = AdapterSpec(topk=3, compact=stored_compact, dtype=dtype, target_modules=["q_proj", "down_proj"])
    source = make_adapter(MODEL, spec, tmp_path / "source")
    again = written(read_checkpoint(source), tmp_path / "again")
    assert load_file(source / WEIGHTS_FILE).keys() == load_file(again / WEIGHTS_FILE).keys()
    assert torch.equal(compact(source).indices, compact(again).indices)
    torch.testing.assert_close(compact(source).full_weights(), compact(again).full_weights(), rtol=0, atol=1e-6)
    assert torch.equal(compact(source).bank.vectors, compact(again).bank.vectors)
    assert_peft_agrees(again)


@pytest.mark.parametrize("topk", range(1, 9))
def test_saturated_selections_are_finite_in_peft(topk: int, tmp_path: Path):
    """A softmax in float32 can sum to more than 1: PEFT answers NaN to its own file, not to ours."""

    def saturate(tensors: dict[str, Tensor]) -> None:
        for key, logits in tensors.items():
            if "vblora_logits" in key:
                generator = torch.Generator().manual_seed(topk)
                tensors[key] = torch.randn(logits.shape, generator=generator) * 12

    spec = AdapterSpec(topk=topk, compact=False, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    full = read_checkpoint(rewrite(make_adapter(MODEL, spec, tmp_path / "source"), tmp_path / "saturated", saturate))
    assert isinstance(full, LogitsCheckpoint)
    expected = peft_logits(peft_reference(MODEL, tmp_path / "saturated"), PROMPT)
    for name, checkpoint in {"topk": full.to_topk(), "again": full.to_topk().to_logits()}.items():
        got = assert_peft_agrees(written(checkpoint, tmp_path / name))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    sums = [t.sum(-1) for key, t in load_file(tmp_path / "topk" / WEIGHTS_FILE).items() if key.endswith("weights")]
    assert all((total <= 1).all() for total in sums)


def test_weights_that_sum_to_more_than_one_are_lowered(tmp_path: Path):
    def exceed(tensors: dict[str, Tensor]) -> None:
        for key, weights in tensors.items():
            if key.endswith("weights"):
                weights[..., 0], weights[..., 1] = 1.0, torch.finfo(torch.float32).eps

    source = make_adapter(MODEL, AdapterSpec(topk=3), tmp_path / "source")
    broken = rewrite(source, tmp_path / "broken", exceed)
    assert peft_logits(peft_reference(MODEL, broken), PROMPT).isnan().any(), "PEFT cannot read it as it is"
    assert_peft_agrees(written(read_checkpoint(broken), tmp_path / "mended"))


def test_compact_and_full_are_exported_either_way(tmp_path: Path):
    full = read_checkpoint(make_adapter(MODEL, AdapterSpec(compact=False), tmp_path / "source"))
    assert isinstance(full, LogitsCheckpoint)
    small = read_checkpoint(written(full.to_topk(), tmp_path / "compact"))
    assert isinstance(small, TopKCheckpoint)
    large = read_checkpoint(written(small.to_logits(), tmp_path / "full"))
    assert isinstance(large, LogitsCheckpoint)
    assert large.resumable is False
    assert small.config == replace(full.config, save_only_topk_weights=True)
    assert large.config == full.config
    outputs = [assert_peft_agrees(tmp_path / name) for name in ("source", "compact", "full")]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_extras_and_training_fields_survive(tmp_path: Path):
    spec = AdapterSpec(bias="vblora_only", modules_to_save=["lm_head"])
    source = make_adapter(tiny_model("qwen2"), spec, tmp_path / "source")
    again = written(read_checkpoint(source), tmp_path / "again")
    first, second = load_file(source / WEIGHTS_FILE), load_file(again / WEIGHTS_FILE)
    extras = [key for key in first if "vblora" not in key]
    assert len(extras) == 5  # lm_head and the biases of q and v in two layers
    assert all(torch.equal(first[key], second[key]) for key in extras)
    values = read_checkpoint(again).config.to_dict()
    assert (values["bias"], values["modules_to_save"], values["vblora_dropout"]) == ("vblora_only", ["lm_head"], 0.0)


def test_peft_trains_a_fresh_adapter(tmp_path: Path):
    config = VBLoRAConfig(num_vectors=32, vector_length=16, target_modules=("q_proj", "v_proj"), task_type="CAUSAL_LM")
    layers = base_modules(MODEL).selected_by(config)
    fresh = LogitsCheckpoint.initialise(config, layers, torch.Generator().manual_seed(0))
    path = written(fresh, tmp_path / "fresh")

    model = PeftModel.from_pretrained(tiny_model("llama"), str(path), is_trainable=True)
    ids = torch.tensor([PROMPT])
    model.train()(input_ids=ids, labels=ids).loss.backward()

    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 1 + 2 * len(layers)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in trainable.values())
    bank = next(p for name, p in trainable.items() if "vector_bank" in name)
    assert torch.equal(bank.detach(), fresh.bank.vectors)


def test_the_same_adapter_is_written_as_the_same_bytes(tmp_path: Path):
    checkpoint = read_checkpoint(make_adapter(MODEL, AdapterSpec(), tmp_path / "source"))
    metadata = {"zürich": '\x1f\x7f/"\\ü', "blend": json.dumps([{"name": "a"}])}
    for i in range(8):
        write_adapter(checkpoint, tmp_path / f"{i}", metadata)
    assert len({(tmp_path / f"{i}" / WEIGHTS_FILE).read_bytes() for i in range(8)}) == 1
    with safe_open(tmp_path / "0" / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


class TestPublication:
    CHECKPOINT = LogitsCheckpoint.initialise(
        VBLoRAConfig(num_vectors=8, vector_length=16, target_modules=("q_proj",)),
        base_modules(MODEL).selected_by(VBLoRAConfig(target_modules=("q_proj",))),
    )

    def test_writes_the_two_files_and_parents(self, tmp_path: Path):
        path = tmp_path / "a" / "b" / "adapter"
        write_adapter(self.CHECKPOINT, path)
        assert {file.name for file in path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
        assert [entry.name for entry in path.parent.iterdir()] == ["adapter"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
        assert torch.equal(load_file(path / WEIGHTS_FILE)[BANK], self.CHECKPOINT.bank.vectors)

    def test_an_empty_directory_may_be_there(self, tmp_path: Path):
        (tmp_path / "adapter").mkdir()
        write_adapter(self.CHECKPOINT, tmp_path / "adapter")
        assert read_checkpoint(tmp_path / "adapter").config == self.CHECKPOINT.config

    @pytest.mark.parametrize("kind", ["file", "directory"])
    def test_nothing_is_overwritten(self, kind: str, tmp_path: Path):
        taken = tmp_path / "adapter"
        precious = taken if kind == "file" else taken / "notes"
        precious.parent.mkdir(exist_ok=True)
        precious.write_text("precious")
        with pytest.raises(FileExistsError):
            write_adapter(self.CHECKPOINT, taken)
        assert precious.read_text() == "precious"
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_failure_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def full_disk(*_: object) -> None:
            raise OSError("no space")

        monkeypatch.setattr(export, "_publish", full_disk)
        with pytest.raises(OSError, match="no space"):
            write_adapter(self.CHECKPOINT, tmp_path / "adapter")
        assert list(tmp_path.iterdir()) == []
