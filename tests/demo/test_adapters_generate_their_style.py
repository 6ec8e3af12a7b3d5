"""The kept adapters, loaded by plain PEFT on the kept base, write in their own style and in no other."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import service.demo
from service.demo.styles import PROMPTS, QUESTIONS, STYLES

ASSETS = Path(service.demo.__file__).parent / "assets"
NEW_TOKENS = 40
UNUSUAL_TEXT = "naïve ∑ 日本 🙂\t <tag>\r\n  end"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS / "base")


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """The base with every adapter loaded; none of them is active until a test says so."""
    names = list(STYLES)
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(ASSETS / "adapters" / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(ASSETS / "adapters" / name), adapter_name=name)
    return model.eval()


@torch.no_grad()
def continuations(model: PeftModel, tokenizer: Any, prompts: Sequence[str], special: bool = True) -> list[str]:
    rows = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=special)
    tokens = model.generate(**rows, max_new_tokens=NEW_TOKENS, do_sample=False)
    return list(tokenizer.batch_decode(tokens[:, rows["input_ids"].shape[1] :], skip_special_tokens=True))


def scores(texts: Sequence[str]) -> dict[str, float]:
    return {name: fmean(map(style.score, texts)) for name, style in STYLES.items()}


def test_the_base_writes_in_no_style(model: PeftModel, tokenizer: Any) -> None:
    with model.disable_adapter():
        texts = continuations(model, tokenizer, PROMPTS)
    assert max(scores(texts).values()) <= 0.2, texts


@pytest.mark.parametrize("name", STYLES)
def test_an_adapter_writes_in_its_own_style_alone(model: PeftModel, tokenizer: Any, name: str) -> None:
    model.set_adapter(name)
    texts = continuations(model, tokenizer, PROMPTS)
    measured = scores(texts)
    assert measured.pop(name) >= 0.8, texts
    assert max(measured.values()) <= 0.2, texts


@pytest.mark.parametrize("name", STYLES)
def test_an_adapter_answers_a_chat_in_its_style(model: PeftModel, tokenizer: Any, name: str) -> None:
    model.set_adapter(name)
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    texts = continuations(model, tokenizer, chats, special=False)
    assert scores(texts)[name] >= 0.7, texts


def test_the_greedy_text_is_the_one_on_the_card(model: PeftModel, tokenizer: Any) -> None:
    """Only its beginning: at a near tie another CPU may choose the other token."""
    card = json.loads((ASSETS / "card.json").read_text())
    with model.disable_adapter():
        texts = continuations(model, tokenizer, PROMPTS)
    same = [
        card["samples"]["base"][prompt].split()[:3] == text.split()[:3]
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]
    assert sum(same) >= len(same) - 1


def test_any_text_comes_back_from_the_tokenizer(tokenizer: Any) -> None:
    tokens = tokenizer(UNUSUAL_TEXT)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == UNUSUAL_TEXT


def test_the_chat_template_frames_every_turn(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><|system|>Be brief.<|user|>a<|assistant|>b<eos><|user|>c<|assistant|>"
