"""A directory in the place of a bucket, for the servers of one machine: flock, temporary files, fsync, rename.

An object's etag is the time of its file in nanoseconds; every put sets a later one than it finds. The directory
must be on a file system whose locks and renames all these servers see at once, as those of one machine's disks are.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.errors import StoreError, StoreUnavailable
from adapters.store.files import fsync_directory, fsync_file, is_full, make_directory, storage_full
from adapters.store.shared.objects import Conflict, Content, ObjectInfo, ObjectMissing, WriteRefused

LEFTOVERS_AFTER_S = 3600.0
_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


class LocalObjects:
    """The objects of a directory, each a file whose path in it is the key. `tmp/` in it has what is being written."""

    def __init__(self, root: Path) -> None:
        """Creates the directory if it is not there. Raises StoreError."""
        self.root = root.absolute()
        self.url = self.root.as_uri()
        self._tmp = self.root / "tmp"
        with self._errors():
            make_directory(self._tmp)
            self._sweep()

    def get(self, key: str, *, unless: str | None = None) -> Content | None:
        with self._errors(), open(self._path(key), "rb") as file:
            etag = _etag(os.fstat(file.fileno()))
            return None if etag == unless else Content(file.read(), etag)

    def put(self, key: str, data: bytes, *, over: str | None) -> str:
        path = self._path(key)
        with self._errors(), self._written() as fresh:
            try:
                fresh.write_bytes(data)
            except OSError as error:
                if error.errno in _REFUSED:
                    raise WriteRefused(self._failed(error).message) from error
                raise
            with self._locked():
                now = _stat_of(path)
                if (None if now is None else _etag(now)) != over:
                    raise Conflict(key)
                later = time.time_ns() if now is None else max(time.time_ns(), now.st_mtime_ns + 1)
                os.utime(fresh, ns=(later, later))
                return self._place(fresh, path)

    def put_file(self, key: str, path: Path) -> None:
        with self._errors(), self._written() as fresh:
            shutil.copyfile(path, fresh)
            self._place(fresh, self._path(key))

    def get_file(self, key: str, path: Path, size: int) -> None:
        with self._errors(), open(self._path(key), "rb") as file, open(path, "xb") as copy:
            shutil.copyfileobj(file, copy)
            if copy.tell() != size:
                raise StoreError(f"{key} in {self.url} has {copy.tell():,} bytes, not {size:,}", subject=key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for directory, _, names in os.walk(self._path(prefix), onerror=self._listing_failed):
            for name in names:
                path = Path(directory, name)
                if (info := _stat_of(path)) is not None:  # else it has just been removed
                    key = path.relative_to(self.root).as_posix()
                    yield ObjectInfo(key, _etag(info), info.st_size, info.st_mtime)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._errors(), suppress(ObjectMissing, FileNotFoundError):
            path.unlink()
            fsync_directory(path.parent)
        with suppress(OSError):  # it has other files
            path.parent.rmdir()

    def _path(self, key: str) -> Path:
        assert ".." not in key.split("/"), "keys are made of encoded names"
        return self.root / key

    def _place(self, fresh: Path, path: Path) -> str:
        """Gives a written file its place, durably; its etag."""
        os.chmod(fresh, 0o600)
        fsync_file(fresh)
        etag = _etag(fresh.stat())
        try:
            make_directory(path.parent)
            os.replace(fresh, path)
        except FileNotFoundError:  # the directory was empty, and its last file's removal has just taken it along
            self._still_there()
            make_directory(path.parent)
            os.replace(fresh, path)
        try:
            fsync_directory(path.parent)
        except FileNotFoundError:  # collected at this very moment, which whoever names the file will see
            self._still_there()
        return etag

    @contextmanager
    def _written(self) -> Iterator[Path]:
        fresh = self._tmp / secrets.token_hex(8)
        try:
            yield fresh
        finally:
            fresh.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, of all processes: from the look at an object to its replacement."""
        descriptor = os.open(self._tmp / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            self._still_there()
            raise ObjectMissing(str(error)) from error
        except OSError as error:
            raise self._failed(error) from error

    def _listing_failed(self, error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # nothing has been put there, or the last of it is gone
            self._still_there()
            return
        raise self._failed(error) from error

    def _still_there(self) -> None:
        """An unmounted directory is not an empty one."""
        if not self._tmp.is_dir():
            raise StoreUnavailable(f"the shared store {self.url} is gone: mount its directory again")

    def _failed(self, error: OSError) -> StoreError:
        if is_full(error):
            return storage_full()
        return StoreUnavailable(f"the shared store {self.url} cannot be used ({error}): see to its directory")

    def _sweep(self) -> None:
        """Removes what processes that were killed left half-written."""
        for path in self._tmp.iterdir():
            info = _stat_of(path)
            if path.name != "lock" and info is not None and info.st_mtime < time.time() - LEFTOVERS_AFTER_S:
                path.unlink(missing_ok=True)


def _stat_of(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _etag(info: os.stat_result) -> str:
    return str(info.st_mtime_ns)
