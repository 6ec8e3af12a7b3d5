"""The card of the kept files: where they come from and what was measured on them."""

import json
import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapter_training import AdapterRecipe
from base_training import CONTEXT, BaseRecipe
from corpus import Corpus
from safetensors import safe_open
from transformers import LlamaForCausalLM

from service.demo.styles import STYLES

CARD = "card.json"
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")


def read_card(folder: Path) -> dict[str, Any]:
    """The card of these files; an empty one where there is none yet."""
    path = folder / CARD
    card: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"adapters": {}}
    return card


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Keeps the card beside the files that it describes."""
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")


def origin(seed: int, corpus: Corpus) -> dict[str, Any]:
    """What the files were made from and with."""
    return {
        "made_by": "python examples/demo/train.py",
        "seed": seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "corpus": {
            "source": "docstrings and pydoc topics of the Python standard library (PSF licence)",
            "characters": corpus.characters,
            "documents": len(corpus.train),
            "held_out_documents": len(corpus.held_out),
        },
    }


def base_entry(model: LlamaForCausalLM, recipe: BaseRecipe, held_out_loss: float, seconds: float) -> dict[str, Any]:
    """The base's part of the card."""
    return {
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": "float16",
        "vocabulary": model.config.vocab_size,
        "context": CONTEXT,
        "training": asdict(recipe),
        "training_wall_seconds": round(seconds),
        "held_out": {"loss": round(held_out_loss, 4), "perplexity": round(math.exp(held_out_loss), 2)},
    }


def adapter_entry(name: str, recipe: AdapterRecipe, folder: Path, seconds: float) -> dict[str, Any]:
    """One adapter's part of the card."""
    training = asdict(recipe)
    shape = {key: training.pop(key) for key in ("r", "num_vectors", "vector_length", "topk", "targets")}
    weights = folder / "adapter_model.safetensors"
    return {
        "description": STYLES[name].description,
        **shape,
        "stored_numbers": _stored_numbers(weights),
        "file_bytes": weights.stat().st_size,
        "training": training,
        "training_wall_seconds": round(seconds),
    }


def _stored_numbers(weights: Path) -> int:
    with safe_open(weights, framework="pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
