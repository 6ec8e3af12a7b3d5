"""Makes the demo's files: a tokenizer, a base language model, VB-LoRA adapters of it, and their card."""

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from adapter_training import BASE_NAME, RECIPES, save_adapter, train_adapter
from base_training import CONTEXT, BaseRecipe, held_out_loss, new_base, train_base
from card import adapter_entry, base_entry, origin, read_card, write_card
from corpus import Corpus, load_corpus
from measure import measure
from rendering import base_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from tokenizer import train_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from service.demo.styles import STYLES

ASSETS = Path(__file__).parents[2] / "service" / "demo" / "assets"

console = Console()


def main() -> None:
    """Trains what is asked for, then measures everything that is there."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    corpus = load_corpus(arguments.seed)
    card = read_card(arguments.out) | origin(arguments.seed, corpus)
    if not arguments.keep_base:
        card["base"] = make_base(corpus, arguments.seed, arguments.base_steps, arguments.out / "base")
        write_card(arguments.out, card)
    base, tokenizer = load_base(arguments.out / "base")
    for name in arguments.adapters:
        folder = arguments.out / "adapters" / name
        card["adapters"][name] = make_adapter(
            base, tokenizer, corpus, name, arguments.seed, arguments.adapter_steps, folder
        )
        write_card(arguments.out, card)
    card |= measure(base, tokenizer, corpus, arguments.out / "adapters")
    write_card(arguments.out, card)
    show(card)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the files (default: the package's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base-steps", type=int, default=BaseRecipe.steps)
    parser.add_argument("--adapter-steps", type=int, help="instead of each recipe's own")
    parser.add_argument("--keep-base", action="store_true", help="use the base that is in the folder")
    parser.add_argument("--adapters", nargs="*", choices=list(RECIPES), default=list(RECIPES), metavar="NAME")
    return parser.parse_args()


def make_base(corpus: Corpus, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Trains and writes the tokenizer and the base; the measurements are of the weights as written."""
    rng = random.Random(seed)
    recipe = replace(BaseRecipe(), steps=steps)
    tokenizer = train_tokenizer((base_text(document, rng) for document in corpus.train), CONTEXT)
    torch.manual_seed(seed)
    model = new_base(tokenizer)
    with progress("base", recipe.steps) as report:
        started = time.monotonic()
        train_base(model, tokenizer, corpus.train, recipe, rng, report)
        seconds = time.monotonic() - started
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    loss = held_out_loss(model.float(), tokenizer, corpus.held_out)
    return base_entry(model, recipe, loss, seconds)


def load_base(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The base as written, in float32 for training and measuring on a CPU, and its tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base.name_or_path = BASE_NAME
    return base, tokenizer


def make_adapter(
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    name: str,
    seed: int,
    steps: int | None,
    folder: Path,
) -> dict[str, Any]:
    """Trains and writes one adapter."""
    recipe = replace(RECIPES[name], steps=steps or RECIPES[name].steps)
    rng = random.Random(f"{seed} {name}")
    with progress(name, recipe.steps) as report:
        started = time.monotonic()
        model = train_adapter(copy.deepcopy(base), tokenizer, corpus.train, name, recipe, rng, report)
        seconds = time.monotonic() - started
    save_adapter(model, folder)
    return adapter_entry(name, recipe, folder, seconds)


def show(card: dict[str, Any]) -> None:
    """Prints what was written, and who writes in which style."""
    for model, samples in card["samples"].items():
        console.rule(model)
        for prompt, text in samples.items():
            console.print(Text.assemble((prompt, "dim"), text))
    table = Table("", *STYLES, title="style scores of greedy continuations")
    for model, scores in card["scores"].items():
        table.add_row(model, *(f"{score:.2f}" for score in scores.values()))
    console.print(table)


@contextmanager
def progress(name: str, steps: int) -> Iterator[Callable[[float], None]]:
    """A progress bar; what it yields is called with the loss of every step."""
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=steps, loss=float("nan"))
        yield lambda loss: bar.update(task, advance=1, loss=loss)


if __name__ == "__main__":
    main()
