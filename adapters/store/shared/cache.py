"""Copies of adapters' files on this machine, whole or not at all, within a budget.

    data_dir/shared/cache/<64 hex>/    one directory per digest; its time says when it was last used
    data_dir/shared/tmp/<random>/      a process's uploads and downloads in progress, locked while it lives

Several processes may have one of these. Who reads a directory holds a shared lock on it, and who clears one away an
exclusive lock, which it does not wait for.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.errors import AdapterError, StoreUnavailable
from adapters.store.files import digest_of, make_directory, make_private, size_of, storage_errors
from adapters.store.names import check_digest

log = logging.getLogger(__name__)

_TRIES = 5
_ROOM_MADE = 0.9  # of the budget, when it is exceeded: looking at everything is not for every download


class BlobCache:
    """Directories by digest. `budget` bounds their files' bytes, but for what is being read. Any thread may call it."""

    _held: int | None

    def __init__(self, root: Path, budget: int) -> None:
        self.root = root / "cache"
        self._tmps = root / "tmp"
        self._budget = budget
        self._lock = threading.Lock()
        self._bringing: dict[str, Future[None]] = {}
        self._verified: set[str] = set()
        with storage_errors():
            make_directory(self.root)
            make_directory(self._tmps)
            starting = _locked(self._tmps, fcntl.LOCK_EX)  # one at a time: nobody sweeps what is not locked yet
            self._sweep()
            self.tmp = self._tmps / secrets.token_hex(8)
            self.tmp.mkdir(mode=0o700)
            self._held = _locked(self.tmp, fcntl.LOCK_SH)
            if starting is not None:
                os.close(starting)
            self._size = sum(size for _, size, _ in self._entries())

    def close(self) -> None:
        """Gives up what is in progress. Calling it again does nothing."""
        with self._lock:
            held, self._held = self._held, None
        if held is not None:
            os.close(held)
            shutil.rmtree(self.tmp, ignore_errors=True)

    def path(self, digest: str) -> Path:
        """Where the files of `digest` are if they are here. Raises InvalidSelection for what is no digest."""
        check_digest(digest)
        return self.root / digest.removeprefix("sha256:")

    @contextmanager
    def reading(self, digest: str, bring: Callable[[Path], None], *, verify: bool = True) -> Iterator[Path]:
        """The directory with the files, not cleared away while the block runs; brought if it is not here.

        `bring` writes them into an empty directory; whoever asks for the same meanwhile waits for it, and gets what it
        raises. With `verify` every time, else once in this process, they are held against the digest, and brought again
        if they are not what it says. Raises StoreUnavailable if they are not even then.
        """
        path = self.path(digest)
        lock = _locked(path, fcntl.LOCK_SH)
        for _ in range(_TRIES):  # others may clear it away at once, where the budget is small
            if lock is not None:
                break
            self._bring(digest, bring)
            lock = _locked(path, fcntl.LOCK_SH)
        try:
            if verify or digest not in self._verified:
                if _is(path, digest):
                    self._verified.add(digest)
                else:
                    log.warning("the copy of %s was damaged; bringing it again", digest)
                    if lock is not None:
                        os.close(lock)
                        lock = None
                    self.drop(digest)
                    self._bring(digest, bring)
                    lock = _locked(path, fcntl.LOCK_SH)
                    if not _is(path, digest):  # another process reads it, so that it could not be taken away
                        raise StoreUnavailable(
                            f"the copy of {digest} on this machine is damaged and in use: try again", subject=digest
                        )
            with suppress(OSError):
                os.utime(path)
            yield path
        finally:
            if lock is not None:
                os.close(lock)

    def place(self, staged: Path, digest: str) -> None:
        """Takes a directory in whose files are those of the digest, unless it has them. It is gone from `staged`."""
        path = self.path(digest)
        try:
            size = size_of(staged)
            os.rename(staged, path)
        except OSError:
            if not path.is_dir():
                raise
            return  # another thread or process was faster
        with self._lock:
            self._verified.add(digest)
            self._size += size
            full = self._size > self._budget
        if full:
            self._make_room(digest)

    def drop(self, digest: str) -> bool:
        """Takes the files away unless somebody reads them; whether they are away."""
        path = self.path(digest)
        lock = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            return not path.exists()
        try:
            size = sum(each.stat().st_size for each in path.iterdir())
            grave = self.tmp / secrets.token_hex(8)
            os.rename(path, grave)
        except OSError:
            return not path.exists()
        finally:
            os.close(lock)
        with self._lock:
            self._verified.discard(digest)
            self._size -= size
        shutil.rmtree(grave, ignore_errors=True)
        return True

    @property
    def size(self) -> int:
        """The bytes of all files here, as far as this process has seen."""
        return self._size

    def _bring(self, digest: str, bring: Callable[[Path], None]) -> None:
        """Brings the files, or waits for the thread that does."""
        with self._lock:
            running = self._bringing.get(digest)
            mine = running is None
            if running is None:
                running = self._bringing[digest] = Future()
        if not mine:
            running.result()
            return
        try:
            self._bring_now(digest, bring)
        except BaseException as error:
            self._end(digest)
            running.set_exception(error)
            raise
        self._end(digest)
        running.set_result(None)

    def _end(self, digest: str) -> None:
        with self._lock:
            del self._bringing[digest]

    def _bring_now(self, digest: str, bring: Callable[[Path], None]) -> None:
        staged = self.tmp / f"brought-{secrets.token_hex(8)}"
        try:
            with storage_errors():
                staged.mkdir(mode=0o700)
                bring(staged)
                if not _is(staged, digest):
                    raise StoreUnavailable(
                        f"the files of {digest} in the shared store are not those that were uploaded; upload "
                        "the adapter again",
                        subject=digest,
                    )
                make_private(staged)
                self.place(staged, digest)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _make_room(self, keep: str) -> None:
        """Clears away what was not used for the longest time, until enough is free or the rest is being read."""
        entries = sorted(self._entries())
        with self._lock:
            self._size = sum(size for _, size, _ in entries)  # other processes' too
        for _, _, digest in entries:
            if self._size <= _ROOM_MADE * self._budget:
                return
            if digest != keep:
                self.drop(digest)

    def _entries(self) -> Iterator[tuple[float, int, str]]:
        """(when it was last used, its bytes, its digest) of every directory here."""
        for path in self.root.iterdir():
            with suppress(OSError):
                yield path.stat().st_mtime, sum(each.stat().st_size for each in path.iterdir()), f"sha256:{path.name}"

    def _sweep(self) -> None:
        """Removes what processes that are gone were at."""
        for path in self._tmps.iterdir():
            lock = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _locked(directory: Path, how: int) -> int | None:
    """A lock on a directory that is in its place, as a descriptor to close; None if it is not there, or is locked."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, how)
        if os.path.samestat(os.fstat(descriptor), os.stat(directory)):  # else it was cleared away in between
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _is(directory: Path, digest: str) -> bool:
    try:
        return digest_of(directory) == digest
    except (OSError, AdapterError):
        return False
