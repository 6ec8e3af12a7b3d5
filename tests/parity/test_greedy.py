"""Greedy text equals PEFT's, token by token, for every form of checkpoint on every architecture.

The adapters are strong: without one, or with another's, every text is a different one.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from adapters.factors import AdapterFactors
from adapters.layers import AdaptedModel
from adapters.low_rank import LowRankBatch
from tests.factories import AdapterSpec, Arch, make_adapter, peft_greedy, peft_reference, tiny_model, widen_adapter
from tests.unit.adapters.support import adapted, alone, factors, token_logits

TOKENS = 16
PROMPT = list(b"VB-LoRA says")
ARCHS: list[Arch] = ["llama", "qwen2", "gpt2"]
ATTENTION = {"llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
MLP = {"llama": ["up_proj", "down_proj"], "qwen2": ["up_proj", "down_proj"], "gpt2": ["c_fc", "mlp.c_proj"]}

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STORED = [(F32, 1), (F32, 2), (F32, 3), (F32, 4), (BF16, 2), (BF16, 3), (F16, 2), (F16, 3)]
FORMS = {
    f"{'compact' if compact else 'full'}-{str(dtype).removeprefix('torch.')}-topk-{topk}": AdapterSpec(
        compact=compact, dtype=dtype, topk=topk
    )
    for compact, (dtype, topk) in itertools.product([True, False], STORED)
}
SELECTIONS = {
    "null": AdapterSpec(),
    "all-linear": AdapterSpec(target_modules="all-linear"),
    "regex": AdapterSpec(target_modules=r".*\.1\..*(v_proj|up_proj|c_attn|c_fc)"),
    "mlp": AdapterSpec(r=2),
    "one layer": AdapterSpec(layers_to_transform=[1], layers_pattern=["layers", "h"]),
    "excluding": AdapterSpec(target_modules="all-linear", exclude_modules=["v_proj", "c_fc"]),
    "lm_head": AdapterSpec(target_modules=["lm_head"]),
    "wide bank": AdapterSpec(num_vectors=300, r=1),
    "long vectors": AdapterSpec(vector_length=32, num_vectors=7, topk=7),
}


@cache
def base(arch: Arch) -> PreTrainedModel:
    return tiny_model(arch)


def greedy(model: AdaptedModel, adapter: AdapterFactors, tokens: int = TOKENS) -> list[int]:
    ids = list(PROMPT)
    for _ in range(tokens):
        ids.append(int(token_logits(model, [ids], alone(adapter))[0, -1].argmax()))
    return ids[len(PROMPT) :]


def pefts(arch: Arch, path: Path, spec: AdapterSpec) -> list[int]:
    """PEFT's own text; of 16-bit compact adapters, which it cannot load, that of their values in float32."""
    readable = path if spec.dtype == torch.float32 or not spec.compact else widen_adapter(path, path / "wide")
    return peft_greedy(peft_reference(base(arch), readable), PROMPT, TOKENS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_form(arch: Arch, form: str, tmp_path: Path):
    spec = replace(FORMS[form], target_modules=ATTENTION[arch] + MLP[arch], seed=list(FORMS).index(form))
    path = make_adapter(base(arch), spec, tmp_path)
    assert greedy(adapted(base(arch)), factors(path)) == pefts(arch, path, spec)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_selection_of_modules(arch: Arch, selection: str, tmp_path: Path):
    spec = SELECTIONS[selection]
    if selection in ("mlp", "one layer"):
        spec = replace(spec, target_modules=MLP[arch])
    path = make_adapter(base(arch), spec, tmp_path)
    assert greedy(adapted(base(arch)), factors(path)) == pefts(arch, path, spec)


@pytest.mark.parametrize("arch", ARCHS)
def test_mixed_batch_in_which_every_row_has_another_adapter(arch: Arch, tmp_path: Path):
    """All rows in one forward at every step; the last one is the base."""
    forms = ["compact-float32-topk-2", "full-float32-topk-4", "compact-bfloat16-topk-3"]
    specs = [
        replace(FORMS[form], target_modules=ATTENTION[arch], seed=seed, r=seed + 2) for seed, form in enumerate(forms)
    ]
    paths = [make_adapter(base(arch), spec, tmp_path / str(spec.seed)) for spec in specs]
    expected = [pefts(arch, path, spec) for path, spec in zip(paths, specs, strict=True)]
    expected.append(peft_greedy(base(arch), PROMPT, TOKENS))
    assert len({tuple(text) for text in expected}) == 4

    model, rows = adapted(base(arch)), [list(PROMPT) for _ in expected]
    batch = LowRankBatch([factors(path) for path in paths], torch.eye(4)[:, :3])
    for _ in range(TOKENS):
        chosen = token_logits(model, rows, batch)[:, -1].argmax(-1).tolist()
        rows = [[*row, token] for row, token in zip(rows, chosen, strict=True)]

    assert [row[len(PROMPT) :] for row in rows] == expected
