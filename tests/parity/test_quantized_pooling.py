"""Quantized bases of classifiers and encoders, on a CPU: texts in one mixed batch against PEFT over the same base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from adapters.errors import MergeUnsupported, UnsupportedCheckpoint
from adapters.merge import Merger
from adapters.quantized import holds_quantized
from service.engine.base_model import BaseModelError, LoadedBase, load_base, load_pretrained
from service.engine.pooling.base import head_of
from service.engine.pooling.runner import embeddings, label_logits
from service.engine.pooling.self_test import choose_pooling_runner
from service.engine.task import Pooling, Task
from tests.factories import untouched_rng
from tests.parity.test_pooling_parity import LABELS, TEXTS, family, make_bench
from tests.pooling_factory import (
    HeadSpec,
    PoolArch,
    make_pool_adapter,
    save_pool_model,
    tiny_classifier,
    tiny_encoder,
    word_tokenizer,
)
from tests.unit.adapters.support import factors

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

CPU = torch.device("cpu")
ARCHS: list[PoolArch] = ["bert", "roberta", "llama"]
METHODS = ["int8", "nf4"]
TARGETS = {"bert": "query", "roberta": "query", "llama": "q_proj"}


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes' kernel for CPUs with AVX512-BF16, which multiplies in bfloat16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def quantized_model(base: Path, how: str, task: Task, labels: int | None = None, dtype: str = "float32") -> Any:
    """What the server loads, with a head for so many labels, which the adapter to come brings itself."""
    model = load_pretrained(str(base), dtype=dtype, device=CPU, quantization=how, task=task).model
    if labels is not None:
        parent, _, name = head_of(model, frozenset()).output.rpartition(".")
        owner = model.get_submodule(parent)
        own = getattr(owner, name)
        with untouched_rng():
            setattr(owner, name, nn.Linear(own.in_features, labels, bias=own.bias is not None, dtype=own.weight.dtype))
        model.config.num_labels = labels
    return model


def pefts_scores(model: Any, adapter: Path, ids: Sequence[int]) -> Tensor:
    with untouched_rng():
        peft = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.inference_mode():
        logits: Tensor = peft(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits.float()


def saved(arch: PoolArch, folder: Path, headless: bool = False) -> Any:
    model = tiny_classifier(arch)
    save_pool_model(model.base_model if headless else model, arch, folder / "base")
    return model


def check_classes(arch: PoolArch, how: str, folder: Path, dtype: str, near: float, headless: bool = False) -> None:
    """Eight heads of four sizes in one batch, every logit within `near` of the largest of PEFT's."""
    adapters = family(saved(arch, folder, headless), folder)
    bench = make_bench(folder, quantization=how, dtype=dtype)
    assert bench.base.quantization == how
    for name, (path, _) in adapters.items():
        bench.register(name, path)
    rows = [(bench.selection(**{name: 1.0}), text) for name, text in zip(adapters, TEXTS, strict=True)]
    answers = bench.read(rows)
    bench.engine.stop()
    assert bench.batches == [sorted(map(len, TEXTS), reverse=True)], "not one batch"
    expected = [
        pefts_scores(quantized_model(folder / "base", how, Task.CLASSIFY, labels, dtype), path, text)
        for (path, labels), text in zip(adapters.values(), TEXTS, strict=True)
    ]
    assert [len(answer) for answer in answers] == LABELS
    largest = max(float(each.abs().max()) for each in expected)
    assert all(float((a - e).abs().max()) < near * largest for a, e in zip(answers, expected, strict=True))


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("headless", [False, True], ids=["with a head", "headless"])
@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("arch", ARCHS)
def test_eight_heads_in_one_batch_are_pefts(arch: PoolArch, how: str, headless: bool, tmp_path: Path) -> None:
    check_classes(arch, how, tmp_path, "float32", 2e-5, headless)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("arch", ["roberta", "llama"])
def test_they_are_to_bfloat16s_rounding(arch: PoolArch, how: str, dtype: str, tmp_path: Path) -> None:
    """With whatever kernels this CPU has."""
    check_classes(arch, how, tmp_path, dtype, 0.05)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("arch", ARCHS)
def test_embeddings_in_one_batch_are_pefts(arch: PoolArch, how: str, tmp_path: Path) -> None:
    model = tiny_encoder(arch)
    save_pool_model(model, arch, tmp_path / "base")
    paths = [make_pool_adapter(model, HeadSpec(None, seed=seed), tmp_path / f"a{seed}") for seed in range(2)]
    bench = make_bench(tmp_path, Task.EMBED, quantization=how, pooling=Pooling.MEAN, normalize=False)
    for i, path in enumerate(paths):
        bench.register(f"a{i}", path)
    rows = [{f"a{i % 3}": 1.0} if i % 3 < 2 else {} for i in range(len(TEXTS))]
    answers = bench.read([(bench.selection(**weights), text) for weights, text in zip(rows, TEXTS, strict=True)])
    bench.engine.stop()
    assert len(bench.batches) == 1
    for i, (text, answer) in enumerate(zip(TEXTS, answers, strict=True)):
        reference = quantized_model(tmp_path / "base", how, Task.EMBED)
        if i % 3 < 2:
            reference = PeftModel.from_pretrained(reference, str(paths[i % 3])).eval()
        with torch.inference_mode():
            expected = reference(input_ids=torch.tensor([text])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(answer, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("task", [Task.CLASSIFY, Task.EMBED])
def test_the_encoder_alone_is_quantized(arch: PoolArch, how: str, task: Task, tmp_path: Path) -> None:
    """All of its linear layers but the pooler; transformers alone would keep no more than the last parameter."""
    saved(arch, tmp_path)
    model = load_pretrained(str(tmp_path / "base"), dtype="float32", device=CPU, quantization=how, task=task).model
    kept = {"classifier", "score", "pooler"}
    linear = {name: holds_quantized(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) >= 12
    for name, quantized in linear.items():
        assert quantized is not bool(kept & set(name.split("."))), name


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("how", METHODS)
def test_a_pooler_that_the_base_lacks_and_an_adapter_brings(how: str, tmp_path: Path) -> None:
    model = saved("bert", tmp_path)
    spec = HeadSpec(3, seed=2, modules_to_save=("pooler",))
    path = make_pool_adapter(model, spec, tmp_path / "a")
    bare = make_pool_adapter(model, HeadSpec(3, seed=3), tmp_path / "bare")
    model.bert.pooler = None  # the files then have none
    save_pool_model(model.bert, "bert", tmp_path / "base")
    bench = make_bench(tmp_path, quantization=how)
    bench.register("a", path)
    (answer,) = bench.read([(bench.selection(a=1.0), TEXTS[0])])
    bench.engine.stop()
    expected = pefts_scores(quantized_model(tmp_path / "base", how, Task.CLASSIFY, 3), path, TEXTS[0])
    torch.testing.assert_close(answer, expected, atol=2e-5, rtol=2e-5)
    with pytest.raises(Exception, match="pooler"):
        bench.register("bare", bare)


@pytest.mark.parametrize("how", METHODS)
def test_a_saved_module_of_the_encoder_is_refused(how: str, tmp_path: Path) -> None:
    model = saved("roberta", tmp_path)
    path = make_pool_adapter(model, HeadSpec(3, seed=2, modules_to_save=("key",)), tmp_path / "a")
    bench = make_bench(tmp_path, quantization=how)
    with pytest.raises(UnsupportedCheckpoint, match="holds quantized"):
        bench.register("a", path)


@pytest.mark.parametrize("how", METHODS)
def test_nothing_is_folded(how: str, tmp_path: Path) -> None:
    path = make_pool_adapter(saved("llama", tmp_path), HeadSpec(2, seed=2), tmp_path / "a")
    merger = Merger(loaded(tmp_path / "base", quantization=how).adapted)
    with pytest.raises(MergeUnsupported, match="quantized"):
        merger.fold([(factors(path), 1.0)])
    assert not merger.is_folded


# --- checkpoints that are quantized already -------------------------------------------------------


def loaded(base: Path, task: Task = Task.CLASSIFY, **options: Any) -> LoadedBase:
    return load_base(str(base), device="cpu", task=task, **options)


def batches_of(base: LoadedBase) -> bool:
    assert base.pooled is not None
    readout = label_logits if base.task is Task.CLASSIFY else embeddings(base.pooled.pooling, normalize=True)
    return choose_pooling_runner(base.adapted, CPU, base.vocabulary, readout, base.pooled.pad)[1]


def write_quantized(arch: PoolArch, kind: Any, folder: Path, config: BitsAndBytesConfig) -> Path:
    """A checkpoint as transformers and bitsandbytes write it."""
    model = kind.from_pretrained(folder / "base", dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder / "quantized")
    word_tokenizer(arch).save_pretrained(folder / "quantized")
    return folder / "quantized"


@pytest.mark.parametrize(("how", "named"), [("int8", "torchao"), ("nf4", "bitsandbytes-4bit")])
@pytest.mark.parametrize("arch", ARCHS)
def test_one_whose_head_is_plain_is_loaded_as_it_is(arch: PoolArch, how: str, named: str, tmp_path: Path) -> None:
    saved(arch, tmp_path)
    model = quantized_model(tmp_path / "base", how, Task.CLASSIFY)
    shutil.copytree(tmp_path / "base", tmp_path / "quantized")
    (tmp_path / "quantized" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "quantized")
    base = loaded(tmp_path / "quantized")
    assert base.quantization == named
    assert batches_of(base)
    head = base.adapted.head
    assert head is not None
    assert head.is_trained
    ids = torch.tensor([TEXTS[0]])
    with torch.inference_mode():
        torch.testing.assert_close(base.adapted.model(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(BaseModelError, match="quantized already"):
        loaded(tmp_path / "quantized", quantization=how)


def test_one_whose_head_is_quantized_is_refused(tmp_path: Path) -> None:
    """As transformers quantizes a RoBERTa classifier unless it is told what to leave."""
    saved("roberta", tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    path = write_quantized("roberta", AutoModelForSequenceClassification, tmp_path, config)
    with pytest.raises(BaseModelError, match=r"'classifier\.\w+' is quantized in this checkpoint.*without the head"):
        loaded(path)


@pytest.mark.parametrize("skipped", [None, ["lm_head"]])
def test_a_language_models_quantized_checkpoint(tmp_path: Path, skipped: list[str] | None) -> None:
    """It has no head: each adapter brings one, and what stands in the model until then is plain."""
    classifier = tiny_classifier("llama")
    with untouched_rng():
        model = AutoModelForCausalLM.from_config(classifier.config)
    model.model.load_state_dict(classifier.model.state_dict())
    save_pool_model(model, "llama", tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=skipped,
        bnb_4bit_compute_dtype=torch.float32,
    )
    path = write_quantized("llama", AutoModelForCausalLM, tmp_path, config)
    base = loaded(path)
    assert base.adapted.head is not None
    assert base.adapted.head.untrained == {"score.weight"}
    assert batches_of(base)
    assert batches_of(loaded(path, Task.EMBED))


@pytest.mark.parametrize(("threshold", "together"), [(0.0, True), (6.0, False)])
def test_llm_int8_reads_one_text_at_a_time(tmp_path: Path, threshold: float, together: bool) -> None:
    saved("roberta", tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=["classifier"])
    path = write_quantized("roberta", AutoModelForSequenceClassification, tmp_path, config)
    assert "bitsandbytes" in json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"]
    base = loaded(path)
    assert base.quantization == "bitsandbytes-8bit"
    assert batches_of(base) is together
