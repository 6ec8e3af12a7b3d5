"""The count is PEFT's, to the number and to the character."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import pytest
import torch
from peft import VBLoRAConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from adapters.config import VBLoRAConfig
from adapters.parameters import Storage, count_parameters, index_width
from adapters.targets import LayerShape

SHAPES = {"first": (64, 96), "second": (96, 32)}


def attention(hidden: int, layers: int, projections: int) -> list[LayerShape]:
    return [LayerShape(f"layers.{i}.{j}", hidden, hidden) for i in range(layers) for j in range(projections)]


def peft_model(config: PeftConfig) -> nn.Module:
    """PEFT's model on layers without weights: a bank of 32,768 vectors has many logits."""
    with torch.device("meta"):
        base = nn.ModuleDict({name: nn.Linear(*shape) for name, shape in SHAPES.items()})
    return get_peft_model(base, config, low_cpu_mem_usage=True)


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "full"])
@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("num_vectors", [60, 255, 256, 300, 32767, 32768])
def test_equals_pefts_count_and_line(num_vectors: int, topk: int, compact: bool):
    fields = {"r": 3, "num_vectors": num_vectors, "vector_length": 32, "topk": topk, "save_only_topk_weights": compact}
    model = peft_model(PeftConfig(target_modules=list(SHAPES), **fields))
    vblora, other = model.get_nb_savable_parameters()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model.print_savable_parameters()

    layers = [LayerShape(name, *shape) for name, shape in SHAPES.items()]
    count = count_parameters(VBLoRAConfig(**fields), layers)

    assert (count.vblora_params, count.other_params) == (vblora, other)
    assert count.summary == printed.getvalue().strip()


@pytest.mark.parametrize(
    ("layers", "full", "compact"),
    [
        (attention(4096, 32, 4), 998_400, 39_936),
        (attention(768, 12, 2), 49_920, 16_224),  # opt-125m
    ],
    ids=["4096-hidden", "opt-125m"],
)
def test_worked_examples(layers: list[LayerShape], full: int, compact: int):
    config = VBLoRAConfig(r=4, num_vectors=60, vector_length=256, topk=2)
    assert config.save_only_topk_weights is False
    by_config = count_parameters(config, layers)
    as_topk = count_parameters(config, layers, storage=Storage.TOPK)
    assert (by_config.storage, by_config.vblora_params) == (Storage.LOGITS, full)
    assert (as_topk.vblora_params, as_topk.full_logits_params) == (compact, full)
    assert as_topk == count_parameters(replace(config, save_only_topk_weights=True), layers)


def test_parts_of_the_count():
    config = VBLoRAConfig(r=4, num_vectors=60, vector_length=256, topk=2, save_only_topk_weights=True)
    count = count_parameters(config, attention(4096, 32, 4), other_params=1_000)
    assert count.lora_params == 4_194_304
    assert count.vector_bank_params == 60 * 256
    assert count.logit_positions == 32 * 4 * 4 * 32
    assert (count.topk_indices_params, count.topk_weights_params) == (32_768, 16_384)
    assert count.logits_params == count.logit_positions * 60
    assert (count.vblora_params, count.total_params) == (39_936, 40_936)
    assert count.summary == (
        "VB-LoRA params to-be-saved (float32-equivalent): 39,936 || total params to-be-saved: 40,936"
    )
    values = json.loads(json.dumps(count.to_dict()))
    assert values["storage"] == "topk"
    assert (values["index_dtype"], values["total_params"], values["summary"]) == ("uint8", 40_936, count.summary)


@pytest.mark.parametrize(
    ("num_vectors", "dtype", "share"),
    [
        (1, "uint8", 0.25),
        (2**8 - 1, "uint8", 0.25),
        (2**8, "int16", 0.5),
        (2**15 - 1, "int16", 0.5),
        (2**15, "int32", 1),
        (2**31 - 1, "int32", 1),
        (2**31, "int64", 2),
    ],
)
def test_index_width(num_vectors: int, dtype: str, share: float):
    assert (index_width(num_vectors).dtype, index_width(num_vectors).float32_equivalents) == (dtype, share)
