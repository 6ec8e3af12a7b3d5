"""Adapters fetched when their name is first asked for: `--resolve dir:/mnt/adapters`, `--resolve hf://org/*`.

However many requests ask for a name, it is looked up once at a time; whoever asks meanwhile waits for that look-up. A
failure is remembered for a short while, so that a flood of unknown names does not become a flood of look-ups.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapters.errors import AdapterError, AdapterExists, AdapterNotFound, InvalidName
from adapters.registry import AdapterRegistry
from adapters.store import SHARED, check_name
from service.api.directories import copy_child
from service.api.errors import ApiError
from service.api.hub import fetch_from_hub
from service.api.hub_ids import HubTemplate
from service.api.registration import register
from service.api.source_errors import SourceNotFound
from service.engine.errors import Overloaded

log = logging.getLogger(__name__)

FAILURE_REMEMBERED_S = 30.0
MOST_FAILURES = 1024
MOST_WAITING = 16  # requests that a look-up holds a worker thread for; the others' threads must stay free
_CHECKED_AT_ONCE = 4  # each holds a whole checkpoint in memory
_RETRY_AFTER_S = 2


class NameSource(Protocol):
    """Where adapters are found by their names."""

    def fetch(self, name: str, staged: Path) -> str:
        """Stages the adapter of that name; where it came from. Raises SourceNotFound if there is none, or ApiError."""
        ...


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """The directories of `root`, by their names."""

    root: Path
    max_bytes: int

    def fetch(self, name: str, staged: Path) -> str:
        try:
            copy_child(self.root, name, staged, max_bytes=self.max_bytes)
        except FileNotFoundError as error:
            raise SourceNotFound(f"there is no directory {str(self.root)!r}") from error
        return str(self.root / name)


@dataclass(frozen=True, slots=True)
class HubSource:
    """The repositories that a template makes of names."""

    template: HubTemplate
    max_bytes: int
    timeout_s: float

    def fetch(self, name: str, staged: Path) -> str:
        repo = self.template.repo_of(name)
        if repo is None:
            raise SourceNotFound(f"no repository of the Hub can be called {name!r}")
        return str(fetch_from_hub(repo, staged, max_bytes=self.max_bytes, timeout_s=self.timeout_s))


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a look-up came to if not to an adapter. Kept as facts: an exception would keep its frames alive."""

    code: str
    message: str

    def error(self, name: str) -> Exception:
        if self.code == AdapterNotFound.code:
            return AdapterNotFound(self.message, subject=name)
        return ApiError(self.code, self.message, param=name)


class AdapterResolver:
    """Looks names up in `sources`, in order, and registers what it finds for all. Any thread may call it, and waits."""

    def __init__(
        self,
        registry: AdapterRegistry,
        sources: Sequence[NameSource],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._sources = tuple(sources)
        self._clock = clock
        self._lock = threading.Lock()
        self._running: dict[str, Future[_Failure | None]] = {}
        self._failures: OrderedDict[str, tuple[float, _Failure]] = OrderedDict()  # by when they are forgotten
        self._waiting = threading.BoundedSemaphore(MOST_WAITING)
        self._checking = threading.BoundedSemaphore(_CHECKED_AT_ONCE)

    def resolve(self, name: str) -> None:
        """Returns once an adapter of that name is registered for all.

        Raises AdapterNotFound if no source has it, ApiError with the code of what was wrong if one has it and it is
        refused or cannot be fetched, and Overloaded when too many requests wait for look-ups.
        """
        try:
            check_name(name)
        except InvalidName as error:
            raise AdapterNotFound(error.message, subject=name) from error
        if not self._waiting.acquire(blocking=False):
            raise Overloaded("too many adapters are being looked up; try again", retry_after_s=_RETRY_AFTER_S)
        try:
            failure = self._outcome(name)
        finally:
            self._waiting.release()
        if failure is not None:
            raise failure.error(name)

    def _outcome(self, name: str) -> _Failure | None:
        """Looks up, or waits for whoever does already, or remembers."""
        with self._lock:
            if (failure := self._remembered(name)) is not None:
                return failure
            running = self._running.get(name)
            mine = running is None
            if running is None:
                running = self._running[name] = Future()
        if mine:
            self._finish(name, running, self._look_up(name))
        return running.result()

    def _finish(self, name: str, running: Future[_Failure | None], failure: _Failure | None) -> None:
        with self._lock:
            del self._running[name]
            if failure is not None:
                self._failures[name] = (self._clock() + FAILURE_REMEMBERED_S, failure)
                while len(self._failures) > MOST_FAILURES:
                    self._failures.popitem(last=False)
        running.set_result(failure)

    def _remembered(self, name: str) -> _Failure | None:
        now = self._clock()
        while self._failures and next(iter(self._failures.values()))[0] <= now:
            self._failures.popitem(last=False)
        known = self._failures.get(name)
        return None if known is None else known[1]

    def _look_up(self, name: str) -> _Failure | None:
        """Never raises: others wait for what comes of it."""
        try:
            self._registry.store.get(SHARED, name)  # by an upload, or by a look-up that has just ended
            return None
        except AdapterNotFound as error:
            missing = _Failure(error.code, error.message)
        except AdapterError as error:
            return _failed(name, error)
        for source in self._sources:
            try:
                self._take_in(name, source)
                return None
            except SourceNotFound:
                continue
            except Exception as error:
                return _failed(name, error)
        return missing

    def _take_in(self, name: str, source: NameSource) -> None:
        with self._registry.store.staging() as staged:
            origin = source.fetch(name, staged)
            with self._checking, suppress(AdapterExists):  # an upload was faster: it is what the name means
                register(self._registry, SHARED, name, staged, source=origin)


def _failed(name: str, error: Exception) -> _Failure:
    if isinstance(error, (ApiError, AdapterError)) and error.code != "internal_error":
        log.warning("the adapter %r was looked up, and cannot be served: %s", name, error.message)
        return _Failure(error.code, f"adapter {name!r} was looked up, and cannot be served: {error.message}")
    log.error("looking up the adapter %r failed", name, exc_info=error)
    return _Failure("internal_error", f"looking up adapter {name!r} failed; the server's log says why")
