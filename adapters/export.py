"""Writes adapters as PEFT directories: compact or with full logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from adapters.checkpoint import LogitsCheckpoint, TopKCheckpoint
from adapters.config import CONFIG_FILE
from adapters.safetensors_header import WEIGHTS_FILE
from adapters.staging import staged_directory


def write_adapter(
    checkpoint: TopKCheckpoint | LogitsCheckpoint, directory: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a PEFT adapter directory that PEFT and this project load. `metadata` goes into the weights' header.

    The directory appears whole or not at all. Raises FileExistsError if it exists and is not empty.
    """
    with staged_directory(directory) as staged:
        write_files(checkpoint, staged, metadata)


def write_files(
    checkpoint: TopKCheckpoint | LogitsCheckpoint, directory: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """The files of a PEFT adapter directory, written into one that is there, as they come."""
    tensors = {key: tensor.contiguous() for key, tensor in checkpoint.tensors().items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt", **(metadata or {})})
    (directory / CONFIG_FILE).write_text(checkpoint.config.to_json(), encoding="utf-8")
