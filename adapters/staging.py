"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_directory(directory: Path) -> Iterator[Path]:
    """A temporary sibling to write into, which becomes `directory` when the block ends, on disk by then.

    An error in the block removes it. Raises FileExistsError if `directory` exists and is not an empty directory.
    """
    check_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield staged
        for path in (*staged.rglob("*"), staged):
            _fsync(path)
        staged.chmod(0o755)
        os.replace(staged, directory)
        _fsync(directory.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def check_free(directory: Path) -> None:
    """Raises FileExistsError if something is there that writing would replace."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} already exists and is not an empty directory")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
