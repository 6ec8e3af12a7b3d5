"""`vblora-serve export DIR`: an adapter compact, or with full logits, as a directory that PEFT loads."""

from __future__ import annotations

from pathlib import Path

from adapters.checkpoint import LogitsCheckpoint, TopKCheckpoint, read_checkpoint
from adapters.export import write_adapter
from adapters.parameters import Storage
from service.commands.output import say, working


def run(directory: Path, *, format: str, output: Path) -> int:
    """Writes the adapter in `directory` to `output` in the other storage, or the same. Raises CheckpointError."""
    with working(f"Reading {directory}"):
        converted = convert(read_checkpoint(directory), Storage(format))
    with working(f"Writing {output}"):
        write_adapter(converted, output)
    say(f"Wrote {output}")
    say(converted.layout.parameters().summary)
    if isinstance(converted, LogitsCheckpoint) and not converted.resumable:
        say("resumable: false (it was compact once: for inference and merging, not for training)")
    return 0


def convert(checkpoint: TopKCheckpoint | LogitsCheckpoint, storage: Storage) -> TopKCheckpoint | LogitsCheckpoint:
    """The same adapter in another storage; one that has it already is itself."""
    if isinstance(checkpoint, LogitsCheckpoint):
        return checkpoint.to_topk() if storage is Storage.TOPK else checkpoint
    return checkpoint.to_logits() if storage is Storage.LOGITS else checkpoint
