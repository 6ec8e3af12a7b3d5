"""API keys read anew when their file has changed, where no signal can say so: a process of Ray's gets none."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from service.api.keys import KeyFileError, KeyRing, load_key_file

log = logging.getLogger(__name__)

_EVERY_S = 5.0


class KeyFile:
    """Keeps a ring as its file is. A file that cannot be used changes nothing, and the log says why, once."""

    def __init__(self, path: Path, ring: KeyRing, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._ring = ring
        self._clock = clock
        self._looked = clock()
        self._stamp = self._stamp_now()

    def look(self) -> None:
        """At most every few seconds; it costs a stat, and a read after a change."""
        if self._clock() - self._looked < _EVERY_S:
            return
        self._looked = self._clock()
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._ring.replace(load_key_file(self._path))
        except KeyFileError as error:
            log.error("the keys stay as they are: %s", error)
        else:
            log.info("read the API keys anew")

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size
