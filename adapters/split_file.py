"""Weights whose vector bank is kept in a file of its own, read as the one file that they were.

Banks that adapters have in common are stored once. There, `adapter_model.safetensors` holds all bytes but the bank's,
and `adapter_model.safetensors.bank` beside it those; where they belong is in the header, which stays in the first.
Whoever reads an adapter's files opens them here and finds what was uploaded, to the byte. Weights with no bank beside
them, as PEFT writes them, are read as they are.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

WEIGHTS_FILE = "adapter_model.safetensors"
BANK_FILE = f"{WEIGHTS_FILE}.bank"
BANK_KEY = "base_model.vblora_vector_bank"

READ_AT_ONCE = 32 << 20  # bytes: larger weights are mapped instead, and are therefore never split

_LONGEST_HEADER = 1 << 20
_CHUNK = 1 << 16
_BANK_ENTRY = re.compile(
    rb'"base_model\.vblora_vector_bank"\s*:\s*\{[^{}]*?"data_offsets"\s*:\s*\[\s*(\d{1,15})\s*,\s*(\d{1,15})\s*\]'
)


def open_file(path: Path, *, follow_links: bool = True) -> io.BufferedReader:
    """An adapter's file for reading, as it was before its bank was taken out. A link to a bank is never followed.

    Raises OSError.
    """
    kept = _open(path, 0 if follow_links else os.O_NOFOLLOW)
    bank = _bank_beside(path)
    if bank is None:
        return io.BufferedReader(kept)
    try:
        return io.BufferedReader(_Joined(kept, _open(bank, os.O_NOFOLLOW)))
    except BaseException:
        kept.close()
        raise


def file_size(path: Path) -> int:
    """The bytes that `open_file` reads. Raises OSError."""
    bank = _bank_beside(path)
    return path.stat().st_size + (0 if bank is None else bank.lstat().st_size)


def is_split(path: Path) -> bool:
    """Whether the file's bank is in another, so that only `open_file` reads it right."""
    return _bank_beside(path) is not None


def bank_range(descriptor: int) -> tuple[int, int] | None:
    """Where in an open weights file its bank is, [begin, end); None where the header tells of none.

    Nothing is checked: all that counts is that what is taken out by this goes back by this to where it was.
    """
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > _LONGEST_HEADER:
        return None
    entry = _BANK_ENTRY.search(os.pread(descriptor, length, 8))
    if entry is None:
        return None
    begin, end = (8 + length + int(offset) for offset in entry.groups())
    return begin, end


class _Joined(io.RawIOBase):
    """Reads a file with its bank put back in. Closes both."""

    def __init__(self, kept: io.FileIO, bank: io.FileIO) -> None:
        self._files = kept, bank
        kept_size, bank_size = (os.fstat(file.fileno()).st_size for file in self._files)
        begin, end = bank_range(kept.fileno()) or (0, 0)
        # Where the bank does not fit the header something is damaged: however it is read, the digest will tell.
        at = begin if end - begin == bank_size and begin <= kept_size else kept_size
        self._pieces = (kept, 0, at), (bank, 0, bank_size), (kept, at, kept_size)  # (file, begin, end)
        self._size = kept_size + bank_size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        before = self._position
        for file, begin, end in self._pieces:
            if before < end - begin:
                room = memoryview(buffer).cast("B")[: end - begin - before]
                read = os.preadv(file.fileno(), [room], begin + before)
                self._position += read
                return read
            before -= end - begin
        return 0

    def readall(self) -> bytes:
        """All that is left, held once: the default holds it twice while it makes bytes of what it has read."""
        whole = io.BytesIO()
        shutil.copyfileobj(self, whole, _CHUNK)
        return whole.getvalue()

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def _bank_beside(path: Path) -> Path | None:
    if path.name != WEIGHTS_FILE:
        return None
    bank = path.with_name(BANK_FILE)
    try:
        return bank if stat.S_ISREG(bank.lstat().st_mode) else None
    except FileNotFoundError:
        return None


def _open(path: Path, flags: int) -> io.FileIO:
    return open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags), "rb", buffering=0)
