"""Files that survive a crash: the digest of a directory, fsync, and what a full disk is called."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adapters.errors import StorageFull, StoreError, UnsupportedCheckpoint
from adapters.split_file import BANK_FILE, file_size, open_file

_CHUNK = 1 << 16  # one small buffer, used again: large ones that come and go leave holes between what memory keeps
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


def regular_files(directory: Path) -> list[Path]:
    """The files of a flat directory, sorted by name.

    Raises UnsupportedCheckpoint when the directory is empty or holds anything else: a subdirectory, a symbolic
    link (never followed), a name that is not UTF-8.
    """
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in found:
        if not entry.is_file(follow_symlinks=False):
            raise UnsupportedCheckpoint(
                f"{entry.name!r} is not a regular file: an adapter is a flat directory of plain files",
                subject=entry.name,
            )
        if not _is_utf8(entry.name):
            raise UnsupportedCheckpoint(f"the file name {entry.name!r} is not UTF-8: rename the file")
    if not found:
        raise UnsupportedCheckpoint("the adapter has no files")
    return [Path(entry.path) for entry in found]


def digest_of(directory: Path) -> str:
    """An adapter's identity, "sha256:<64 hex>": `digest_of_files` of a flat directory's files, as they were uploaded.

    Raises UnsupportedCheckpoint for anything but plain files, StoreError for a file that changes while it is read.
    """
    return digest_of_files({path.name: path for path in uploaded_files(directory)})


def size_of(directory: Path) -> int:
    """The bytes of a flat directory's files together, as they were uploaded. Raises UnsupportedCheckpoint."""
    return sum(file_size(path) for path in uploaded_files(directory))


def uploaded_files(directory: Path) -> list[Path]:
    """`regular_files`, without the one that holds a part of another."""
    return [path for path in regular_files(directory) if path.name != BANK_FILE]


def digest_of_files(files: Mapping[str, Path]) -> str:
    """The digest that a directory of these files, by their names in it, would have.

    The hash runs over the files in order of their names' UTF-8 bytes, each written as

        length of name (8 bytes, big endian) · name (UTF-8) · length of file (8 bytes, big endian) · its bytes

    so that no two directories share an encoding. Modes and times do not count, nor whether a bank is kept in a file of
    its own. Raises StoreError for a file that changes while it is read.
    """
    digest = hashlib.sha256()
    for name, path in sorted(files.items(), key=lambda file: file[0].encode()):
        digest.update(len(name.encode()).to_bytes(8, "big") + name.encode())
        _update_with_file(digest, path)
    return f"sha256:{digest.hexdigest()}"


def _update_with_file(digest: hashlib._Hash, path: Path) -> None:
    with open_file(path, follow_links=False) as file:
        expected = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest.update(expected.to_bytes(8, "big"))
        size, buffer = 0, memoryview(bytearray(_CHUNK))
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
            size += read
    if size != expected:
        raise StoreError(f"{path.name!r} changed while it was read: try again", subject=path.name)


def make_private(directory: Path) -> None:
    """Give the directory and its files to their owner alone (0700, 0600).

    Raises UnsupportedCheckpoint as `regular_files` does, for a file with a second hard link, and for one that would be
    taken for a bank of ours.
    """
    for path in regular_files(directory):
        if path.name == BANK_FILE:
            raise UnsupportedCheckpoint(f"no file of an adapter may be called {BANK_FILE!r}", subject=BANK_FILE)
        descriptor = _open_plain(path)
        try:
            if os.fstat(descriptor).st_nlink > 1:
                raise UnsupportedCheckpoint(
                    f"{path.name!r} has another name elsewhere, by which it could be changed: copy the file",
                    subject=path.name,
                )
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    os.chmod(directory, 0o700)


def make_durable(directory: Path) -> None:
    """Put a flat directory on the disk, the contents of its files before their names; a bank's is there already."""
    for path in uploaded_files(directory):
        fsync_file(path)
    fsync_directory(directory)


def fsync_file(path: Path) -> None:
    """Put a file's contents on the disk."""
    descriptor = _open_plain(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(directory: Path) -> None:
    """Put a directory's entries on the disk: a rename into it is durable only after this."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Create a private directory, durably, with its parents; one that exists is left as it is."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    fsync_directory(directory.parent)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Inside, what the file system refuses becomes StorageFull or, for any other reason, StoreError."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise storage_full() from error
        reason = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
        raise StoreError(f"the adapter store cannot use its files: {reason}; check the data directory") from error


def is_full(error: OSError) -> bool:
    """Whether the disk, or our quota of it, is used up."""
    return error.errno in _NO_SPACE


def storage_full() -> StorageFull:
    return StorageFull("the disk under the adapter store is full: delete adapters or make room, then try again")


def _open_plain(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
