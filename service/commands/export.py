"""`vblora-serve export DIR`: an adapter compact, with full logits, or as plain LoRA, as a directory that PEFT loads."""

from __future__ import annotations

from pathlib import Path

from adapters.checkpoint import LogitsCheckpoint
from adapters.export import converted, write_adapter
from adapters.parameters import Storage
from adapters.reading import read_adapter
from service.commands.output import say, working


def run(directory: Path, *, format: str, output: Path) -> int:
    """Writes the adapter in `directory` to `output` in another storage, or the same. Raises AdapterError."""
    with working(f"Reading {directory}"):
        result = converted(read_adapter(directory), Storage(format))
    with working(f"Writing {output}"):
        write_adapter(result, output)
    say(f"Wrote {output}")
    say(result.layout.parameters().summary)
    if isinstance(result, LogitsCheckpoint) and not result.resumable:
        say("resumable: false (it was compact once: for inference and merging, not for training)")
    return 0
