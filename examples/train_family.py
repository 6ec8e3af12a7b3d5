"""Trains a family of VB-LoRA adapters on one vector bank: the first trains it, the others only choose from it.

    python examples/train_family.py --model BASE --output FAMILY formal=formal.txt casual=casual.txt terse=terse.txt
    python examples/train_family.py --model BASE --output FAMILY --first FAMILY/formal poetic=poetic.txt

Each NAME=TEXT is an adapter and the text that it learns to continue. A server keeps the family's bank once on its disk,
in memory and on the device.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    first: Path | None = options.first
    for name, text in options.adapters:
        base = AutoModelForCausalLM.from_pretrained(options.model)  # anew: PEFT changes the model that it is given
        torch.manual_seed(options.seed)
        config = adapter_config(options)
        model = get_peft_model(base, config) if first is None else join_family(base, config, first)
        tokens = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
        loss = train(model, tokens, options)
        model.save_pretrained(str(options.output / name))
        first = first or options.output / name
        print(f"{name}: loss {loss:.3f}, {options.output / name}")


def join_family(base: PreTrainedModel, config: VBLoRAConfig, first: Path) -> PeftModel:
    """The next adapter: it has the first one's bank as it is, and only its own logits are trained."""
    model = get_peft_model(base, config)
    bank = model.base_model.vblora_vector_bank["default"]
    bank.data.copy_(load_file(first / "adapter_model.safetensors")["base_model.vblora_vector_bank"])
    bank.requires_grad = False
    return model


def adapter_config(options: argparse.Namespace) -> VBLoRAConfig:
    """Within a family only num_vectors and vector_length must agree: they are the bank's."""
    return VBLoRAConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        num_vectors=options.num_vectors,
        vector_length=options.vector_length,
        topk=options.topk,
        target_modules=options.targets.split(","),
        save_only_topk_weights=True,
    )


def train(model: PeftModel, tokens: Tensor, options: argparse.Namespace) -> float:
    """Some steps on random pieces of `tokens` [length]; the last step's loss."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    banks = [parameter for name, parameter in named if "vector_bank" in name]
    others = [parameter for name, parameter in named if "vector_bank" not in name]
    groups = [{"params": banks, "lr": 1e-3}, {"params": others, "lr": 1e-2}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    model.train()
    for _ in range(options.steps):
        starts = torch.randint(max(1, len(tokens) - options.length), (options.batch,)).tolist()
        rows = torch.stack([tokens[start : start + options.length] for start in starts])  # [batch, length]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=named_text, metavar="NAME=TEXT", help="an adapter, its text file")
    parser.add_argument("--model", required=True, help="the base model: a directory or a Hub id")
    parser.add_argument("--output", required=True, type=Path, help="the adapters are written to OUTPUT/NAME")
    parser.add_argument("--first", type=Path, metavar="DIR", help="an adapter whose family all of these join")
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--num-vectors", type=int, default=256)
    parser.add_argument("--vector-length", type=int, default=256, help="must divide the features of every target (256)")
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--targets", default="q_proj,v_proj", help="module names, with commas (q_proj,v_proj)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (128)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def named_text(argument: str) -> tuple[str, Path]:
    name, equals, path = argument.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{argument!r} is not NAME=TEXT")
    return name, Path(path)


if __name__ == "__main__":
    main()
