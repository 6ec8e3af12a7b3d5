"""A server with VB-LoRA and plain LoRA adapters together: every row of a flood, blends too, is what PEFT says."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.factories import AdapterSpec, Arch, make_adapter, peft_greedy, peft_reference, save_model, tiny_model
from tests.lora_factory import make_lora
from tests.server import Server

PROMPTS = [b"The quick brown fox", b"a", b"plain and blended"]
TOKENS = 12
SELECTIONS = [
    {},
    {"plain": 1.0},
    {"patterned": 1.0},
    {"vblora": 1.0},
    {"plain": 0.7, "vblora": 0.4},
    {"plain": -0.3, "patterned": 0.8, "vblora": 0.5},
]


def blended(model: PreTrainedModel, adapters: dict[str, Path], weights: dict[str, float]) -> PreTrainedModel:
    """The base with the weighted sum of PEFT's dense deltas added."""
    result = copy.deepcopy(model)
    for name, weight in weights.items():
        for module_name, module in peft_reference(model, adapters[name]).base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                with torch.no_grad():
                    result.get_submodule(module_name).weight += weight * module.get_delta_weight("default")
    return result


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_mixed_flood(arch: Arch, tmp_path: Path) -> None:
    model = tiny_model(arch)
    save_model(model, tmp_path / "base")
    alphas = {"layers.1.self_attn.q_proj": 1, "h.1.attn.c_attn": 1}
    patterned: dict[str, Any] = {"rank_pattern": {"v_proj|c_fc": 6}, "alpha_pattern": alphas, "use_rslora": True}
    plain: dict[str, Any] = {"dtype": torch.bfloat16, "lora_alpha": 2}
    adapters = {
        "plain": make_lora(model, tmp_path / "plain", target_modules="all-linear", **plain),
        "patterned": make_lora(model, tmp_path / "patterned", seed=1, target_modules="all-linear", **patterned),
        "vblora": make_adapter(model, AdapterSpec(seed=2), tmp_path / "vblora"),
    }
    expected = {
        (i, prompt): peft_greedy(blended(model, adapters, weights), list(prompt), TOKENS)
        for i, weights in enumerate(SELECTIONS)
        for prompt in PROMPTS
    }
    assert len({tuple(tokens) for tokens in expected.values()}) > len(expected) // 2, "adapters must be visible"
    with Server("serve", "--model", str(tmp_path / "base"), data_dir=tmp_path / "data") as server:
        for name, path in adapters.items():
            response = server.upload(name, path)
            assert response.status_code == 201, response.text

        def answer(case: tuple[int, bytes]) -> list[int]:
            weights = SELECTIONS[case[0]]
            parts = [{"name": name, "weight": weight} for name, weight in weights.items()]
            selection = {"adapters": parts} if parts else {"adapter": "base"}
            body = server.generate(list(case[1]), max_new_tokens=TOKENS, ignore_eos=True, **selection)
            tokens: list[int] = body["choices"][0]["token_ids"]
            return tokens

        with ThreadPoolExecutor(12) as pool:
            answers = dict(zip(expected, pool.map(answer, expected), strict=True))
        assert answers == expected
        stored = [{"name": name, "weight": weight} for name, weight in SELECTIONS[-1].items()]
        made = server.http.post("/v1/blends", json={"name": "stored", "adapters": stored})
        assert (made.status_code, made.json()["storage"]) == (201, "lora"), made.text
        for prompt in PROMPTS:
            body = server.generate(list(prompt), adapter="stored", mode="merge", max_new_tokens=TOKENS, ignore_eos=True)
            assert body["choices"][0]["token_ids"] == expected[len(SELECTIONS) - 1, prompt]
        assert server.stop() == 0
