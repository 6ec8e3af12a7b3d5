"""Adapters as commands read them: a directory that somebody typed, and errors that name it."""

from __future__ import annotations

from pathlib import Path

from adapters.config import CONFIG_FILE
from adapters.errors import AdapterError
from adapters.reading import AnyCheckpoint, read_adapter
from service.commands import CommandError
from service.commands.progress import working


def check_directory(directory: Path) -> None:
    """Raises CommandError for what is no directory, or where PEFT has put an adapter with a name of its own inside."""
    if not directory.is_dir():
        raise CommandError(f"{directory} is not a directory; give one that holds an {CONFIG_FILE}")
    inner = [] if (directory / CONFIG_FILE).is_file() else sorted(directory.glob(f"*/{CONFIG_FILE}"))
    if inner:
        raise CommandError(f"{directory} holds no {CONFIG_FILE}, but {inner[0].parent} does: give that one")


def read_directory(directory: Path) -> AnyCheckpoint:
    """The adapter in a directory. Raises CommandError, which says why it is refused."""
    check_directory(directory)
    with working(f"Reading {directory}"):
        try:
            return read_adapter(directory)
        except AdapterError as error:
            raise CommandError(f"{directory} is refused ({error.code}): {error.message}") from error
