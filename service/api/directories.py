"""Adapters in directories of the server's machine, copied file by file into a staging directory.

A directory is opened once and its files are opened relative to it, so that nothing can be put in its place between a
check and a read. Only the files that an adapter consists of are ever opened.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.config import CONFIG_FILE
from adapters.split_file import BANK_FILE
from service.api.adapter_files import ADAPTER_FILES, MAX_OPTIONAL_BYTES, OPTIONAL_FILES
from service.api.source_errors import SourceNotFound, bad_source, too_large

_CHUNK = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_ON_THE_WAY = os.O_DIRECTORY | getattr(
    os, "O_PATH", os.O_RDONLY
)  # passed through, not read, where there is a difference


def copy_directory(directory: Path, staged: Path, *, max_bytes: int, follow_links: bool = False) -> None:
    """Copies an adapter's files from `directory` into `staged`. Blocks on the disk.

    Links are followed only with `follow_links`: without, neither among its files nor anywhere in its own path, which
    is absolute and resolved already. Raises SourceNotFound, or ApiError for files that cannot be taken.
    """
    try:
        descriptor = os.open(directory, _DIRECTORY) if follow_links else _open_without_links(directory)
    except OSError as error:
        raise SourceNotFound(
            f"{str(directory)!r} is not a directory that the server can read: {error.strerror}"
        ) from error
    with _closing(descriptor):
        _copy_files(descriptor, staged, max_bytes, 0 if follow_links else os.O_NOFOLLOW)


def _open_without_links(directory: Path) -> int:
    """Opens one part of the path after the other: a link put there since the path was resolved is not followed."""
    root, *parts = directory.parts
    descriptor = os.open(root, _ON_THE_WAY)
    for i, part in enumerate(parts):
        how = _DIRECTORY if i == len(parts) - 1 else _ON_THE_WAY
        with _closing(descriptor):
            descriptor = os.open(part, how | os.O_NOFOLLOW, dir_fd=descriptor)
    return descriptor


def copy_child(root: Path, name: str, staged: Path, *, max_bytes: int) -> None:
    """Copies the adapter in the directory `name` of `root`, none of whose links are followed. `name` is one part."""
    assert "/" not in name
    assert name not in ("", ".", "..")
    with open_directory(root) as parent:
        try:
            descriptor = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        except OSError as error:
            raise SourceNotFound(f"{name!r} is not a directory that the server can read: {error.strerror}") from error
        with _closing(descriptor):
            _copy_files(descriptor, staged, max_bytes, os.O_NOFOLLOW)


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """A descriptor of a directory, for what is opened relative to it. Raises OSError."""
    descriptor = os.open(path, _DIRECTORY)
    with _closing(descriptor):
        yield descriptor


@contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


def _copy_files(directory: int, staged: Path, max_bytes: int, flags: int) -> None:
    if BANK_FILE in os.listdir(directory):
        raise bad_source(
            "this is how a store keeps an adapter, its bank apart: `vblora-serve export` makes a copy of it"
        )
    room = max_bytes
    for name in ADAPTER_FILES:
        room -= _copy_file(directory, name, staged / name, room, flags)


def _copy_file(directory: int, name: str, target: Path, room: int, flags: int) -> int:
    """Copies one plain file; the bytes copied. An optional file that is not there is none."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | flags, dir_fd=directory)
    except FileNotFoundError:
        if name in OPTIONAL_FILES:
            return 0
        message = f"the directory has no {name}: give a PEFT adapter's directory"
        raise (SourceNotFound(message) if name == CONFIG_FILE else bad_source(message)) from None
    except OSError as error:
        reason = "it is a symbolic link, which is not followed" if error.errno == errno.ELOOP else error.strerror
        raise bad_source(f"{name} cannot be read: {reason}") from error
    with _closing(descriptor):
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise bad_source(f"{name} is not a plain file: copy the adapter into a directory of plain files")
        if name in OPTIONAL_FILES and status.st_size > MAX_OPTIONAL_BYTES:
            raise too_large(name, status.st_size, f"the {MAX_OPTIONAL_BYTES:,} that it may take")
        if status.st_size > room:
            raise too_large(name, status.st_size, "--max-upload allows for an adapter")
        with open(descriptor, "rb", closefd=False) as file, open(target, "xb") as copy:
            remaining = status.st_size  # and no more, should it grow
            while remaining and (chunk := file.read(min(_CHUNK, remaining))):
                remaining -= copy.write(chunk)
        return status.st_size
