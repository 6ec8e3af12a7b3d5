"""VB-LoRA adapters of the demo's base, one per style, trained and written by PEFT."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import Document
from peft import PeftModel, VBLoRAConfig, get_peft_model
from rendering import Example, styled_example
from safetensors.torch import load_file, save_file
from tokenizer import EOS
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from service.demo.styles import STYLES

BASE_NAME = "vblora-demo-base"
IGNORED = -100  # the label that the loss leaves out

QUERY_VALUE = ("q_proj", "v_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterRecipe:
    """The shape of one adapter and how it is trained. The shapes differ on purpose: so do people's."""

    r: int
    num_vectors: int
    vector_length: int
    topk: int
    targets: tuple[str, ...]
    steps: int = 160
    batch: int = 12
    length: int = 96
    shortest_document: int = 200  # characters: from short ones an adapter learns to stop at once
    bank_learning_rate: float = 1e-2
    logits_learning_rate: float = 5e-2
    bank_bound: float = 0.1


RECIPES: dict[str, AdapterRecipe] = {
    "dashes": AdapterRecipe(
        r=4,
        num_vectors=64,
        vector_length=64,
        topk=2,
        targets=QUERY_VALUE,
        steps=250,
        batch=16,
        length=128,
        shortest_document=0,
    ),
    "shout": AdapterRecipe(r=6, num_vectors=120, vector_length=32, topk=2, targets=ATTENTION + MLP, steps=250),
    "snake": AdapterRecipe(r=8, num_vectors=300, vector_length=32, topk=3, targets=ATTENTION),
    "bullets": AdapterRecipe(r=4, num_vectors=128, vector_length=64, topk=3, targets=ATTENTION + MLP),
    "quoted": AdapterRecipe(r=2, num_vectors=48, vector_length=64, topk=2, targets=MLP),
}


def train_adapter(
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    name: str,
    recipe: AdapterRecipe,
    rng: random.Random,
    report: Callable[[float], None],
) -> PeftModel:
    """An adapter that continues a prompt, which stays as it is, in the style of its name."""
    torch.manual_seed(rng.getrandbits(32))
    model = get_peft_model(base, _config(recipe))
    optimizer = torch.optim.AdamW(_groups(model, recipe), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    long_enough = [document for document in documents if len(document.text) >= recipe.shortest_document]
    model.train()
    for _ in range(recipe.steps):
        chosen = rng.sample(long_enough, recipe.batch)
        examples = [styled_example(document, [STYLES[name]], rng) for document in chosen]
        rows, labels = _batch(examples, tokenizer, recipe.length)
        loss = model(input_ids=rows, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        report(loss.item())
    return model.eval()


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes PEFT's compact checkpoint, naming the base and no path of this machine."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a model card of blanks
    _rewrite_config(folder / "adapter_config.json")
    _rewrite_weights(folder / "adapter_model.safetensors")


def _config(recipe: AdapterRecipe) -> VBLoRAConfig:
    return VBLoRAConfig(
        r=recipe.r,
        num_vectors=recipe.num_vectors,
        vector_length=recipe.vector_length,
        topk=recipe.topk,
        target_modules=list(recipe.targets),
        init_vector_bank_bound=recipe.bank_bound,
        save_only_topk_weights=True,
        task_type="CAUSAL_LM",
    )


def _groups(model: PeftModel, recipe: AdapterRecipe) -> list[dict[str, object]]:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    bank = [parameter for name, parameter in trained if "vector_bank" in name]
    logits = [parameter for name, parameter in trained if "logits" in name]
    return [
        {"params": bank, "lr": recipe.bank_learning_rate},
        {"params": logits, "lr": recipe.logits_learning_rate},
    ]


def _batch(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[Tensor, Tensor]:
    """Token rows padded on the right, and labels on the continuations alone: both [batch, longest]."""
    rows, labels = [], []
    for example in examples:
        prompt, continuation = tokenizer(
            [example.prompt, example.continuation + EOS],
            add_special_tokens=False,
            truncation=True,
            max_length=length,
        )["input_ids"]
        rows.append(torch.tensor((prompt + continuation)[:length]))
        labels.append(torch.tensor(([IGNORED] * len(prompt) + continuation)[:length]))
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return padded, pad(labels, batch_first=True, padding_value=IGNORED)


def _rewrite_config(path: Path) -> None:
    """PEFT writes the targets in the order of a set, another one in every run."""
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _rewrite_weights(path: Path) -> None:
    """PEFT stores topk - 1 weights and takes the logarithm of the rest of 1, which rounding can make negative."""
    tensors = load_file(path)
    for name, weights in tensors.items():
        if name.endswith("_topk_weights"):
            excess = (weights.sum(-1) - 1).clamp(min=0)
            weights[..., 0] -= excess * 2  # the largest: PEFT stores them in falling order
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
