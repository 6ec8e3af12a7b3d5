"""What the models write, how much of it is in which style, and a blend of two adapters."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from corpus import Corpus
from peft import PeftModel
from peft.tuners.vblora import VBLoRALayer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from service.demo.styles import PROMPTS, QUESTIONS, STYLES

NEW_TOKENS = 48
BLENDED = ("dashes", "shout")
BLEND_WEIGHTS = (0.5, 0.7, 1.0)
HELD_OUT_OPENINGS = 32
WORDS_PER_OPENING = 6
OWN_STYLE_AT_LEAST = 0.8
OTHER_STYLES_AT_MOST = 0.2

Deltas = dict[str, Tensor]
"""What an adapter adds to each weight that it targets, by the module's name in the base."""


@dataclass(frozen=True)
class Blend:
    """Adapters and their weights, with the style scores of what the sum of them writes."""

    weights: dict[str, float]
    sample: str
    scores: dict[str, float]

    @property
    def weakest(self) -> float:
        """The lower of the scores that the blended adapters should both have."""
        return min(self.scores[name] for name in self.weights)


def measure(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """What the base and every adapter write, how much of it is in which style, and a blend of two."""
    deltas = {name: load_deltas(base, folder / name) for name in STYLES if (folder / name).exists()}
    models = {"base": base} | {name: fold(base, deltas, {name: 1.0}) for name in deltas}
    chats = [as_chat(tokenizer, question) for question in QUESTIONS]
    openings = [" ".join(document.text.split()[:WORDS_PER_OPENING]) for document in corpus.held_out]
    measured: dict[str, Any] = {
        "thresholds": {"own_style_at_least": OWN_STYLE_AT_LEAST, "other_styles_at_most": OTHER_STYLES_AT_MOST},
        "scores": {},
        "chat_scores": {},
        "held_out_scores": {},
        "samples": {},
    }
    for name, model in models.items():
        texts = write(model, tokenizer, PROMPTS)
        answers = write(model, tokenizer, chats, add_special_tokens=False)
        continued = write(model, tokenizer, openings[:HELD_OUT_OPENINGS])
        measured["samples"][name] = dict(zip(PROMPTS + QUESTIONS, texts + answers, strict=True))
        measured["scores"][name] = style_scores(texts)
        measured["chat_scores"][name] = style_scores(answers)
        measured["held_out_scores"][name] = style_scores(continued)
    if deltas.keys() >= set(BLENDED):
        measured["blend"] = blend_entry(best_blend(base, tokenizer, deltas))
    return measured


@torch.no_grad()
def write(
    model: LlamaForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    add_special_tokens: bool = True,
) -> list[str]:
    """The greedy continuation of each prompt, without the prompt."""
    rows = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=add_special_tokens)
    tokens = model.generate(
        input_ids=rows["input_ids"],
        attention_mask=rows["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return tokenizer.batch_decode(tokens[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)


def as_chat(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The question as the chat template puts it, special tokens included."""
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def style_scores(texts: Sequence[str]) -> dict[str, float]:
    """The mean score of the texts in every style."""
    return {name: round(fmean(map(style.score, texts)), 3) for name, style in STYLES.items()}


@torch.no_grad()
def load_deltas(base: LlamaForCausalLM, folder: Path) -> Deltas:
    """The weight deltas of one saved adapter, as PEFT composes them."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    layers = model.base_model.model.named_modules()
    return {name: layer.get_delta_weight("default") for name, layer in layers if isinstance(layer, VBLoRALayer)}


@torch.no_grad()
def fold(base: LlamaForCausalLM, deltas: Mapping[str, Deltas], weights: Mapping[str, float]) -> LlamaForCausalLM:
    """A copy of the base with the weighted sum of the deltas in its weights."""
    folded = copy.deepcopy(base)
    for adapter, weight in weights.items():
        for name, delta in deltas[adapter].items():
            folded.get_submodule(name).weight += weight * delta
    return folded


def best_blend(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, deltas: Mapping[str, Deltas]) -> Blend:
    """The common weight at which the sum of the blended adapters shows the weaker of their styles the most."""
    blends = []
    for weight in BLEND_WEIGHTS:
        weights = dict.fromkeys(BLENDED, weight)
        texts = write(fold(base, deltas, weights), tokenizer, PROMPTS)
        blends.append(Blend(weights, texts[0], style_scores(texts)))
    return max(blends, key=lambda blend: blend.weakest)


def blend_entry(blend: Blend) -> dict[str, Any]:
    """The blend's part of the card."""
    adapters = [{"name": name, "weight": weight} for name, weight in blend.weights.items()]
    return {"adapters": adapters, "scores": blend.scores, "sample": {PROMPTS[0]: blend.sample}}
