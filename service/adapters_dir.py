"""`--adapters-dir`: a directory whose sub-directories are adapters, looked through at start and then every few seconds.

A sub-directory is registered under its own name when it is new and whenever its files have changed. What is refused is
logged once, with the reason, and tried again when its files change. A sub-directory that is gone deletes nothing.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.config import CONFIG_FILE
from adapters.errors import AdapterError, AdapterTooLarge, StoreError
from adapters.registry import AdapterRegistry
from adapters.store import SHARED, check_name, digest_of
from service.api.adapter_files import ADAPTER_FILES
from service.api.directories import copy_child, open_directory
from service.api.errors import ApiError
from service.api.registration import register, register_unless_known

log = logging.getLogger(__name__)

# Of each file that is there: its name, inode, size in bytes and time of change in nanoseconds.
Fingerprint = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A sub-directory as it was last looked at: the digest of what was registered, or why it was refused."""

    fingerprint: Fingerprint
    digest: str | None = None
    reason: str | None = None
    try_again: bool = False


class _StillChanging(Exception):
    """The files changed while they were copied: whoever writes them has not finished."""


class AdaptersDirectory:
    """One such directory, and what was seen of it. `scan` is for one thread at a time."""

    def __init__(self, registry: AdapterRegistry, path: Path, *, max_bytes: int) -> None:
        self._registry = registry
        self._path = path
        self._max_bytes = max_bytes
        self._seen: dict[str, _Seen] = {}
        self._unreadable = False

    def scan(self) -> None:
        """Registers what is new or has changed since the last scan. Raises nothing that a directory can cause."""
        try:
            found = fingerprints(self._path)
        except OSError as error:
            if not self._unreadable:
                log.warning("%s cannot be looked through: %s", self._path, error.strerror)
            self._unreadable = True
            return
        self._unreadable = False
        self._seen = {name: seen for name, seen in self._seen.items() if name in found}
        for name, fingerprint in found.items():
            before = self._seen.get(name)
            if before is None or before.fingerprint != fingerprint or before.try_again:
                self._look_at(name, fingerprint, before)

    def _look_at(self, name: str, fingerprint: Fingerprint, before: _Seen | None) -> None:
        known = before.digest if before is not None else None
        try:
            self._seen[name] = _Seen(fingerprint, self._take_in(name, fingerprint, known))
        except _StillChanging:
            return  # as it was: the next scan finds it changed
        except (AdapterError, ApiError, OSError) as error:
            # A full disk or a failing one may mend without a change of these files.
            passing = isinstance(error, (StoreError, OSError)) and not isinstance(error, AdapterTooLarge)
            reason = str(getattr(error, "message", error))
            if before is None or (before.fingerprint, before.reason) != (fingerprint, reason):
                log.warning("the adapter in %s is not taken in: %s", self._path / name, reason)
            self._seen[name] = _Seen(fingerprint, known, reason, try_again=passing)

    def _take_in(self, name: str, fingerprint: Fingerprint, known: str | None) -> str:
        """Registers the files unless they are those known, or were registered before this server started."""
        check_name(name)
        source = str(self._path / name)
        with self._registry.store.staging() as staged:
            copy_child(self._path, name, staged, max_bytes=self._max_bytes)
            if _fingerprint(self._path, name) != fingerprint:
                raise _StillChanging
            if known is None:
                return register_unless_known(self._registry, name, staged, source=source)
            digest = digest_of(staged)
            if digest != known:  # else only their times have changed, and a rollback stands
                register(self._registry, SHARED, name, staged, replace=True, source=source)
            return digest


def fingerprints(path: Path) -> Mapping[str, Fingerprint]:
    """The sub-directories with an adapter_config.json, by name in order. Opens none of their files. Raises OSError."""
    with open_directory(path) as descriptor:
        names = sorted(os.listdir(descriptor))
        found = {name: tuple(_facts(descriptor, name)) for name in names if not name.startswith(".")}
    return {name: facts for name, facts in found.items() if any(fact[0] == CONFIG_FILE for fact in facts)}


def _fingerprint(path: Path, name: str) -> Fingerprint:
    with open_directory(path) as descriptor:
        return tuple(_facts(descriptor, name))


def _facts(parent: int, name: str) -> Iterator[tuple[str, int, int, int]]:
    """The files of a directory; none of what is no directory, or has gone."""
    try:
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            return
    except OSError:
        return
    for file in ADAPTER_FILES:
        try:
            status = os.stat(f"{name}/{file}", dir_fd=parent, follow_symlinks=False)
        except OSError:
            continue
        yield file, status.st_ino, status.st_size, status.st_mtime_ns


class AdaptersDirectoryWatcher:
    """Scans on a thread of its own, every `interval_s`, from `start` until `stop`."""

    def __init__(self, directory: AdaptersDirectory, interval_s: float) -> None:
        self._directory = directory
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vblora-adapters-dir", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when a scan that is running has ended."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self._directory.scan()
            except Exception:
                log.exception("looking through the adapters' directory failed; trying again")
