"""Trains a VB-LoRA adapter that continues a text the way another text goes on.

    python train_writer.py --output work
    python train_writer.py --output work --resume                          # goes on with what it has trained
    python train_writer.py --output work --base HuggingFaceTB/SmolLM2-135M --vector-length 64 --text notes.txt

The base is a causal language model, by default the demo's; the text is this folder's README by default. Writes
work/writer/trained and work/writer/compact (see saving.py).
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel, TaskType, VBLoRAConfig, get_peft_model
from saving import save_both
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
DEMO_BASE = HERE.parents[1] / "service" / "demo" / "assets" / "base"


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    folder = options.output / "writer"
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    text = " ".join(
        options.text.read_text(encoding="utf-8").split()
    )  # where its lines end is not what is to be learned
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    torch.manual_seed(options.seed)
    model = begin(options, folder / "trained" if options.resume else None)
    before = loss_of(model, tokens, options.length)
    train(model, tokens, options)
    after = loss_of(model, tokens, options.length)
    print(f"loss on the text: {before:.3f} before, {after:.3f} after")
    if after >= before:
        raise SystemExit("the adapter has learned nothing: try more --steps")
    save_both(model, folder)


def begin(options: argparse.Namespace, resumed: Path | None) -> PeftModel:
    """A fresh adapter, or one that was trained before."""
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    if resumed is not None:
        return PeftModel.from_pretrained(base, str(resumed), is_trainable=True)
    config = VBLoRAConfig(
        task_type=TaskType.CAUSAL_LM,
        r=4,
        num_vectors=128,
        vector_length=options.vector_length,  # must divide the features of every target layer
        topk=2,
        target_modules=options.targets.split(","),
        save_only_topk_weights=False,  # all logits, so that training can go on from what is saved
    )
    return get_peft_model(base, config)


def train(model: PeftModel, tokens: Tensor, options: argparse.Namespace) -> None:
    """Some steps on random pieces of `tokens` [length of the text]."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    bank = [parameter for name, parameter in trained if "vector_bank" in name]
    logits = [parameter for name, parameter in trained if "vblora_logits" in name]
    optimizer = torch.optim.AdamW(
        [{"params": bank, "lr": 1e-2}, {"params": logits, "lr": 5e-2}],
        weight_decay=0.0,
    )
    model.train()
    for _ in range(options.steps):
        starts = torch.randint(max(1, len(tokens) - options.length), (options.batch,)).tolist()
        rows = torch.stack([tokens[start : start + options.length] for start in starts])  # [batch, length]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


@torch.inference_mode()
def loss_of(model: PeftModel, tokens: Tensor, length: int) -> float:
    """The mean over the whole text, in pieces."""
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    return model.eval()(input_ids=rows, labels=rows).loss.item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--base", default=str(DEMO_BASE), help="a language model: a directory or a Hub id (the demo's)")
    parser.add_argument("--text", type=Path, default=HERE / "README.md", help="what to learn from (the README here)")
    parser.add_argument("--resume", action="store_true", help="go on with OUTPUT/writer/trained")
    parser.add_argument("--targets", default="q_proj,v_proj", help="module names, with commas (q_proj,v_proj)")
    parser.add_argument("--vector-length", type=int, default=64, help="must divide the features of the targets (64)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more than 1 only hold a small model up (1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
