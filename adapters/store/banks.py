"""Vector banks by digest: those that are equal are one file, of which each adapter that has it holds a hard link.

The links are the count of references: a bank with no name but its own belongs to nobody. Names come and go under one
lock, so that a bank is never taken for an orphan while an adapter is about to link to it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import stat
import threading
from collections.abc import Iterable
from pathlib import Path

from adapters.split_file import BANK_FILE, READ_AT_ONCE, bank_range
from adapters.store import files

logger = logging.getLogger(__name__)

_HEX_DIGITS = 64
_CHUNK = 1 << 16

# A file system without hard links, or one that allows none here.
_NO_LINKS = frozenset({errno.EMLINK, errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


class BankDirectory:
    """`banks/sha256/<hex>`, each file named by the sha256 of its content: a bank's bytes, without dtype and shape."""

    def __init__(self, data_dir: Path, tmp: Path) -> None:
        self.root = data_dir / "banks" / "sha256"
        self._tmp = tmp
        self._lock = threading.RLock()
        files.make_directory(self.root)

    def take_out(self, weights: Path) -> None:
        """Leave all but the bank in a staged weights file, and put a link to the one copy of the bank beside it.

        Weights that are large or hold no bank stay as they are, and so do all where files have no second names. Raises
        OSError, and then too they are as they were. The bank is on the disk afterwards; the rest is the caller's to put
        there.
        """
        with open(weights, "rb") as file:
            place = bank_range(file.fileno())
            size = os.fstat(file.fileno()).st_size
            if place is None or not place[0] < place[1] <= size or size > READ_AT_ONCE:
                return
            content = memoryview(file.read())
        begin, end = place
        bank = self.root / hashlib.sha256(content[begin:end]).hexdigest()
        link, rest = weights.with_name(BANK_FILE), self._tmp / f"rest-{secrets.token_hex(8)}"
        taken = False
        try:
            _write(rest, (content[:begin], content[end:]))
            if self._link(bank, link, content[begin:end]):
                os.replace(rest, weights)
                taken = True
        finally:
            rest.unlink(missing_ok=True)
            if not taken:
                link.unlink(missing_ok=True)
                self.drop(bank)

    def used_by(self, directory: Path) -> Path | None:
        """The bank that an adapter's directory links to, for `drop` once the directory is gone."""
        try:
            if not stat.S_ISREG((directory / BANK_FILE).lstat().st_mode):
                return None
            with open(os.open(directory / BANK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                return self.root / hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None  # or one that cannot be read: the next start looks at all of them

    def drop(self, bank: Path) -> bool:
        """Remove a bank if no adapter links to it; whether it was removed."""
        with self._lock:
            if not _is_orphan(bank):
                return False
            bank.unlink()
            return True

    def orphans(self) -> list[Path]:
        """The banks that no adapter links to; files that are not ours are passed over."""
        named = (path for path in self.root.iterdir() if len(path.name) == _HEX_DIGITS)
        return sorted(path for path in named if _is_orphan(path))

    def sweep(self) -> int:
        """Remove the banks that no adapter links to; the number removed."""
        return sum(self.drop(bank) for bank in self.orphans())

    def _link(self, bank: Path, link: Path, content: memoryview) -> bool:
        """Make `link` a name of the one copy, stored if it was not; False where files have no second names."""
        fresh = self._tmp / f"bank-{secrets.token_hex(8)}"
        try:
            if self._link_to(bank, link, content):
                return True
            _write(fresh, (content,))
            files.fsync_file(fresh)  # written outside the lock, as it takes the longest
            with self._lock:
                if not self._link_to(bank, link, content):  # still: else another adapter has just brought it
                    os.link(fresh, link, follow_symlinks=False)  # first: where this is refused, nothing is stored
                    os.rename(fresh, bank)  # those who link to one that it replaces keep that one
            files.fsync_directory(self.root)
            return True
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return False
        finally:
            fresh.unlink(missing_ok=True)

    def _link_to(self, bank: Path, link: Path, content: memoryview) -> bool:
        """Whether the bank is stored, holds what it should, and has taken `link` as one more name."""
        try:
            with self._lock:
                os.link(bank, link, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno == errno.EMLINK:  # a second copy takes the name, and the links from here on
                return False
            raise
        if _holds(link, content):
            return True
        logger.warning("the stored bank %s was damaged; replacing it", bank.name)
        link.unlink()
        return False


def _is_orphan(bank: Path) -> bool:
    try:
        status = bank.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _holds(path: Path, content: memoryview) -> bool:
    """Whether the content of a file, which is no link, is this."""
    try:
        if path.lstat().st_size != len(content) or not stat.S_ISREG(path.lstat().st_mode):
            return False
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as file:
            return all(file.read(_CHUNK) == content[at : at + _CHUNK] for at in range(0, len(content), _CHUNK))
    except OSError:
        return False


def _write(path: Path, pieces: Iterable[memoryview]) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        for piece in pieces:
            file.write(piece)
