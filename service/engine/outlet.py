"""Where one request's events leave the engine."""

from __future__ import annotations

import threading

from service.engine.events import Event, EventSink, FailedEvent, FinishedEvent


class Outlet:
    """Passes events on, in order, and none after the last. Any thread may call it."""

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._closed = False

    def send(self, event: Event) -> None:
        """Raises what the sink does."""
        with self._lock:
            if not self._closed:
                self._sink(event)

    def close(self, event: FinishedEvent | FailedEvent) -> None:
        """Sends the last event, unless one was sent. Raises what the sink does, which has had its last event then."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._sink(event)
