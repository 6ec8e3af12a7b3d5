"""What an ingress is doing: counted, so that it can end in order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from service.api.errors import ApiError


class Work:
    """The requests under way. They begin and end on the event loop; any thread may have them end.

    `draining` takes nothing new; `ended` has what still ran fail.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._tasks: set[asyncio.Task[object]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.draining = False
        self.ended = False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """One request. Raises ApiError while none is taken."""
        with self._changed:
            if self.draining:
                raise ApiError(
                    "engine_unavailable", "the server is draining: it finishes what it has and takes nothing new"
                )
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def may_be_ended(self) -> Iterator[None]:
        """Around what is cancelled when time is up: then raises ApiError."""
        task = asyncio.current_task()
        assert task is not None
        self._loop = asyncio.get_running_loop()
        self._tasks.add(task)
        try:
            if self.ended:
                raise _stopping()
            yield
        except asyncio.CancelledError:
            if not self.ended:
                raise  # the client has left
            raise _stopping() from None
        finally:
            self._tasks.discard(task)

    def drain(self, timeout_s: float) -> bool:
        """Takes no new requests and waits for those that run; False when some were still running."""
        with self._changed:
            self.draining = True
            return self._changed.wait_for(lambda: self._running == 0, timeout_s)

    def stop(self) -> None:
        """Has what still runs fail. Calling it again does nothing."""
        self.draining = self.ended = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for task in list(self._tasks):
            task.cancel()


def _stopping() -> ApiError:
    return ApiError("engine_unavailable", "the server is stopping")
