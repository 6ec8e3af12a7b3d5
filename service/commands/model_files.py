"""The files of a base model: where they are, and those beside its weights that a model made from it needs too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from service.commands import CommandError
from service.commands.base import check_model
from service.commands.progress import working

CONFIG_FILE = "config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

# Generation config, tokenizer, chat templates, licence: by name, because a repository holds much else, code included.
_CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken",
    "tekken.json", "chat_template.json", CHAT_TEMPLATE_FILE, "additional_chat_templates/*.jinja",
    "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "model.safetensors.index.json")
_OTHER_WEIGHTS = ("*/*.safetensors", "consolidated*")  # the same once more, in another layout


def model_directory(model: str) -> Path:
    """Where a model's files are: of a Hub id in the Hub's cache, downloaded if need be. Raises CommandError."""
    check_model(model)
    if Path(model).is_dir():
        return Path(model)
    with working(f"Looking up {model}"):
        try:
            patterns = [CONFIG_FILE, *_CARRIED, *_WEIGHTS]
            return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=list(_OTHER_WEIGHTS)))
        except (OSError, ValueError, HfHubHTTPError, HTTPError) as error:
            raise CommandError(f"cannot get the base model {model!r} from the Hub: {error}") from error


def read_model_config(directory: Path) -> dict[str, Any]:
    """config.json, unparsed. Raises CommandError."""
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"{path} cannot be read: {reason}; give a Hugging Face model's directory") from error
    if not isinstance(config, dict):
        raise CommandError(f"{path} is not a JSON object")
    return config


def write_model_config(config: dict[str, Any], directory: Path) -> None:
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def carry_files(source: Path, destination: Path) -> None:
    """Copies what a model needs beside its config and weights."""
    for pattern in _CARRIED:
        for path in source.glob(pattern):
            if path.is_file():
                target = destination / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
