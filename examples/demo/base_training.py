"""The demo's base: a Llama of some three million parameters that has read the standard library's documentation."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from corpus import Document
from rendering import base_text
from tokenizer import BOS, EOS
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 512


@dataclass(frozen=True)
class BaseRecipe:
    """How the base is trained."""

    steps: int = 1400
    batch: int = 16
    length: int = 256
    learning_rate: float = 2e-3
    warmup: int = 60
    weight_decay: float = 0.1


def new_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained base. Every size is a multiple of 64, so vector lengths up to 64 fit every layer."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
            eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_base(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    recipe: BaseRecipe,
    rng: random.Random,
    report: Callable[[float], None],
) -> None:
    """Trains in place on packed documents; `report` is called with the loss of every step."""
    optimizer = torch.optim.AdamW(_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, recipe))
    blocks = torch.empty(0, recipe.length + 1, dtype=torch.long)
    model.train()
    for _ in range(recipe.steps):
        if len(blocks) < recipe.batch:
            blocks = torch.cat([blocks, _packed(documents, tokenizer, recipe.length, rng)])
        rows, blocks = blocks[: recipe.batch], blocks[recipe.batch :]
        loss = _loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        report(loss.item())
    model.eval()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> float:
    """Nats per token on plain documents that training has not read."""
    texts = [f"{BOS}{document.text}{EOS}" for document in documents]
    blocks = _blocks(texts, tokenizer, BaseRecipe.length)
    return sum(_loss(model, rows).item() * len(rows) for rows in blocks.split(16)) / len(blocks)


def _loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits  # [batch, length, vocabulary]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _packed(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, length: int, rng: random.Random
) -> Tensor:
    """One epoch: every document once, rendered anew, in a new order, cut into blocks."""
    order = rng.sample(documents, len(documents))
    return _blocks([base_text(document, rng) for document in order], tokenizer, length)


def _blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for row in rows for token in row])
    whole = len(tokens) // (length + 1) * (length + 1)
    return tokens[:whole].view(-1, length + 1)  # [blocks, length + 1]


def _groups(model: LlamaForCausalLM, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay, the norms' vectors do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _cosine(step: int, recipe: BaseRecipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
