"""Adapters' files by digest. A directory appears under its digest whole, by a rename, and leaves the same way.

The banks of their weights are taken out of them where that can be, and kept once for all that have the same.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.errors import AdapterError
from adapters.split_file import WEIGHTS_FILE
from adapters.store import files
from adapters.store.banks import BankDirectory
from adapters.store.names import check_digest

logger = logging.getLogger(__name__)

_HEX_DIGITS = 64


class BlobDirectory:
    """`blobs/sha256/<hex>/`, and the `tmp/` beside it on the same file system, from which blobs are renamed."""

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir / "blobs" / "sha256"
        self.tmp = data_dir / "tmp"
        for directory in (self.root, self.tmp):
            files.make_directory(directory)
        self.banks = BankDirectory(data_dir, self.tmp)

    def path(self, digest: str) -> Path:
        """Where the files of `digest` are if they are stored. Raises InvalidSelection for what is no digest."""
        check_digest(digest)
        return self.root / digest.removeprefix("sha256:")

    def digests(self) -> Iterator[str]:
        """Every digest that has a directory; entries that are not ours are passed over."""
        with os.scandir(self.root) as entries:
            for entry in entries:
                if len(entry.name) == _HEX_DIGITS and set(entry.name) <= set("0123456789abcdef"):
                    yield f"sha256:{entry.name}"

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private directory under tmp/, gone afterwards unless it was placed.

        A disk that fills up inside the block is StorageFull.
        """
        with files.storage_errors():
            directory = Path(tempfile.mkdtemp(prefix="staging-", dir=self.tmp))
        try:
            yield directory
        except OSError as error:
            if files.is_full(error):
                raise files.storage_full() from error
            raise
        finally:
            self._remove_tree(directory)

    def seal(self, staged: Path) -> tuple[str, int]:
        """Put a staged directory's files on the disk, and return their digest and their bytes together.

        Once sealed, a directory is placed or given up: its weights may have lost their bank to `banks`.
        """
        assert staged.is_relative_to(self.tmp), "only what was staged here can be renamed into place"
        files.make_private(staged)
        digest, size = files.digest_of(staged), files.size_of(staged)
        if (staged / WEIGHTS_FILE).exists():
            self.banks.take_out(staged / WEIGHTS_FILE)
        files.make_durable(staged)
        return digest, size

    def place(self, staged: Path, digest: str) -> None:
        """Give a sealed directory its place. One already there is kept if intact, and replaced if it is damaged."""
        target = self.path(digest)
        if os.path.lexists(target):
            if self.is_intact(digest):
                return
            logger.warning("the stored files of %s were damaged; replacing them", digest)
            self.remove(digest)
        os.rename(staged, target)
        files.fsync_directory(self.root)

    def is_intact(self, digest: str) -> bool:
        """Whether the files of `digest` are stored, and are what it says. Reads them."""
        try:
            return files.digest_of(self.path(digest)) == digest
        except (OSError, AdapterError):
            return False

    def remove(self, digest: str) -> None:
        """Take a blob away. It leaves by a rename into tmp/, so that a crash never leaves half of it in place."""
        grave = self.tmp / f"removed-{secrets.token_hex(8)}"
        try:
            os.rename(self.path(digest), grave)
        except FileNotFoundError:
            return
        self._remove_tree(grave)

    def clear_tmp(self) -> int:
        """Remove what a process that was killed left in tmp/; the number of things removed."""
        leftovers = self.leftovers()
        for path in leftovers:
            self._remove_tree(path)
        return len(leftovers)

    def leftovers(self) -> list[Path]:
        """What is in tmp/. At a start, and for whoever else owns the directory, nothing of it is in use."""
        return sorted(self.tmp.iterdir())

    def sweep(self, in_use: Collection[str]) -> int:
        """Remove every blob that is not in use; the number removed."""
        orphans = [digest for digest in self.digests() if digest not in in_use]
        for digest in orphans:
            self.remove(digest)
        return len(orphans)

    def _remove_tree(self, path: Path) -> None:
        """Also the bank, if this was the last that had it."""
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        bank = self.banks.used_by(path)
        shutil.rmtree(path, ignore_errors=True)
        if bank is not None:
            self.banks.drop(bank)
