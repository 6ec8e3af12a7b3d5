"""An adapter that is on the server's own disk already, copied from a directory that the operator allows."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

from adapters.config import CONFIG_FILE
from adapters.safetensors_header import WEIGHTS_FILE
from service.api.errors import ApiError

REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)
OPTIONAL_FILES = ("chat_template.jinja",)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CHUNK = 1 << 20


def copy_source(source: str, staged: Path, *, allowed: Collection[Path], max_bytes: int) -> None:
    """Copies the adapter's files from the directory `source` into `staged`. Blocks on the disk.

    The directory, its links resolved, must lie in one of `allowed`. Links among its files are not followed. Raises
    ApiError: `forbidden` outside of what is allowed, `payload_too_large`, else `invalid_request`.
    """
    directory = _allowed(source, allowed)
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise _bad_source(f"{source!r} is not a directory that the server can read: {error.strerror}") from error
    try:
        for name in (*REQUIRED_FILES, *OPTIONAL_FILES):
            max_bytes -= _copy_file(descriptor, name, staged / name, max_bytes)
    finally:
        os.close(descriptor)


def _allowed(source: str, allowed: Collection[Path]) -> Path:
    if match := _URL.match(source):
        raise _bad_source(
            f"sources at {match[0]} are not supported by this version: download the adapter, and upload its files"
        )
    if "\0" in source or not os.path.isabs(source):
        raise _bad_source(f"{source!r} is not an absolute path: give the adapter's directory on the server")
    directory = Path(os.path.realpath(source))
    if any(directory.is_relative_to(os.path.realpath(root)) for root in allowed):
        return directory
    raise ApiError(
        "forbidden",
        f"the server may not read adapters from {source!r}: upload the files, or start it with --allow-source and a "
        "directory that holds them",
        param="source",
    )


def _copy_file(directory: int, name: str, target: Path, room: int) -> int:
    """Copies one plain file; the bytes copied. An optional file that is not there is none."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        if name in OPTIONAL_FILES:
            return 0
        raise _bad_source(f"the directory has no {name}: give a PEFT adapter's directory") from None
    except OSError as error:
        raise _bad_source(f"{name} cannot be read (symbolic links are not followed): {error.strerror}") from error
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _bad_source(f"{name} is not a plain file: copy the adapter into a directory of plain files")
        if status.st_size > room:
            raise ApiError(
                "payload_too_large",
                f"{name} takes {status.st_size:,} bytes: more than --max-upload allows for an adapter",
                param="source",
            )
        with open(target, "xb") as copy:
            shutil.copyfileobj(file, copy, _CHUNK)
        return status.st_size


def _bad_source(message: str) -> ApiError:
    return ApiError("invalid_request", message, param="source")
