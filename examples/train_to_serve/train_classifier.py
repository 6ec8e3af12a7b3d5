"""Trains a VB-LoRA adapter that says what a sentence is about, and the classification head that goes with it.

    python train_classifier.py --output work
    python train_classifier.py --output work --resume                      # goes on with what it has trained
    python train_classifier.py --output work --base FacebookAI/roberta-base

Writes work/classifier/trained and work/classifier/compact (see saving.py), each with the names of its classes, and
work/classifier/base unless --base names another.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, TaskType, VBLoRAConfig, get_peft_model
from saving import save_both
from sentences import LABELS, Example, train_and_held_out
from small_base import make_base
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    folder = options.output / "classifier"
    learned, held_out = train_and_held_out()
    base = options.base or str(make_base([example.text for example in learned], folder / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(options.seed)
    resumed = folder / "trained" if options.resume else None
    model = begin(base, options.targets.split(","), options.vector_length, resumed)
    train(model, tokenizer, learned, options.epochs, options.batch)
    accuracy = accuracy_of(model, tokenizer, held_out)
    print(f"{accuracy:.0%} of {len(held_out)} held-out sentences are right; by chance it were {1 / len(LABELS):.0%}")
    if accuracy <= 1 / len(LABELS):
        raise SystemExit("the adapter has learned nothing: try more --epochs")
    save_both(model, folder)
    for kind in ("trained", "compact"):
        (folder / kind / "labels.json").write_text(json.dumps(LABELS))


def begin(base: str, targets: Sequence[str], vector_length: int, resumed: Path | None) -> PeftModel:
    """A fresh adapter, or one that was trained before, on a base whose head has a feature for each label."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    if resumed is not None:
        return PeftModel.from_pretrained(model, str(resumed), is_trainable=True)
    config = VBLoRAConfig(
        task_type=TaskType.SEQ_CLS,  # the head is trained whole, and saved with the adapter
        r=4,
        num_vectors=64,
        vector_length=vector_length,  # must divide the features of every target layer
        topk=2,
        target_modules=list(targets),
        save_only_topk_weights=False,  # all logits, so that training can go on from what is saved
    )
    return get_peft_model(model, config)


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], epochs: int, batch: int
) -> None:
    """Some passes over the examples, with a learning rate for each kind of parameter."""
    optimizer = torch.optim.AdamW(parameter_groups(model), weight_decay=0.0)
    order = random.Random(0)
    model.train()
    for epoch in range(epochs):
        shuffled = order.sample(examples, len(examples))
        for start in range(0, len(shuffled), batch):
            chosen = shuffled[start : start + batch]
            rows = tokenizer([example.text for example in chosen], padding=True, return_tensors="pt")
            loss = model(**rows, labels=torch.tensor([example.label for example in chosen])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.eval()


def parameter_groups(model: PeftModel) -> list[dict[str, object]]:
    """The bank, the logits that choose from it, and the head."""
    bank, logits, head = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (bank if "vector_bank" in name else logits if "vblora_logits" in name else head).append(parameter)
    rates = (1e-2, 5e-2, 2e-3)  # for the small base here; large ones want less: 1e-3, 1e-2, 1e-4
    return [{"params": params, "lr": rate} for params, rate in zip((bank, logits, head), rates, strict=True)]


@torch.inference_mode()
def accuracy_of(model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> float:
    rows = tokenizer([example.text for example in examples], padding=True, return_tensors="pt")
    chosen = model(**rows).logits.argmax(-1)  # [examples]
    return (chosen == torch.tensor([example.label for example in examples])).float().mean().item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--base", help="an encoder: a directory or a Hub id (default: a small random one, made here)")
    parser.add_argument("--resume", action="store_true", help="go on with OUTPUT/classifier/trained")
    parser.add_argument("--targets", default="query,value", help="module names, with commas (query,value)")
    parser.add_argument("--vector-length", type=int, default=32, help="must divide the features of the targets (32)")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more than 1 only hold a small model up (1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
