"""Writes adapters as PEFT directories: compact, with full logits, or as plain LoRA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from adapters.config import CONFIG_FILE
from adapters.errors import InvalidSelection
from adapters.lora import LoRACheckpoint, stack_lora
from adapters.parameters import Storage
from adapters.reading import AnyCheckpoint, as_served
from adapters.safetensors_header import WEIGHTS_FILE
from adapters.staging import staged_directory


def converted(checkpoint: AnyCheckpoint, storage: Storage) -> AnyCheckpoint:
    """The same adapter in another storage; one that has it already is itself.

    Plain LoRA is a VB-LoRA adapter's exact factors. Raises InvalidSelection for the way back, which has none.
    """
    if checkpoint.layout.parameters().storage is storage:
        return checkpoint
    compact = as_served(checkpoint)
    if isinstance(compact, LoRACheckpoint):
        raise InvalidSelection(
            f"this is a plain LoRA adapter: it has no vector bank for {storage.value!r} to hold; export it as 'lora'",
            subject="format",
        )
    match storage:
        case Storage.TOPK:
            return compact
        case Storage.LOGITS:
            return compact.to_logits()
        case Storage.LORA:
            return stack_lora([(compact, 1.0)])


def write_adapter(checkpoint: AnyCheckpoint, directory: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a PEFT adapter directory that PEFT and this project load. `metadata` goes into the weights' header.

    The directory appears whole or not at all. Raises FileExistsError if it exists and is not empty.
    """
    with staged_directory(directory) as staged:
        write_files(checkpoint, staged, metadata)


def write_files(checkpoint: AnyCheckpoint, directory: Path, metadata: Mapping[str, str] | None = None) -> None:
    """The files of a PEFT adapter directory, written into one that is there, as they come."""
    tensors = {key: tensor.contiguous() for key, tensor in checkpoint.tensors().items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt", **(metadata or {})})
    _sort_metadata(directory / WEIGHTS_FILE)
    (directory / CONFIG_FILE).write_text(checkpoint.config.to_json(), encoding="utf-8")


def _sort_metadata(path: Path) -> None:
    """The same adapter is the same bytes, and so has one digest: safetensors writes metadata in any order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length, "only the order changes"
        file.seek(8)
        file.write(text)
