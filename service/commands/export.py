"""`vblora-serve export DIR`: an adapter compact, with full logits, or as plain LoRA, as a directory that PEFT loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from adapters.checkpoint import LogitsCheckpoint
from adapters.export import converted, write_files
from adapters.parameters import Storage
from adapters.staging import check_free, staged_directory
from service.api.adapter_files import OPTIONAL_FILES
from service.commands.adapter import read_directory
from service.commands.output import say
from service.commands.progress import working


def run(directory: Path, *, format: str, output: Path) -> int:
    """Writes the adapter in `directory` to `output` in another storage, or the same; its chat template comes along.

    Raises AdapterError for one that is refused, FileExistsError if something is in `output`.
    """
    check_free(output)
    result = converted(read_directory(directory), Storage(format))
    with working(f"Writing {output}"), staged_directory(output) as staged:
        write_files(result, staged)
        for name in OPTIONAL_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, staged / name)
    say(f"Wrote {output}")
    say(result.layout.parameters().summary)
    if isinstance(result, LogitsCheckpoint) and not result.resumable:
        say("resumable: false (it was compact once: for inference and merging, not for training)")
    return 0
