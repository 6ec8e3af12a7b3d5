"""Log lines of other processes of this machine in this one's log, each whole, as they were written."""

from __future__ import annotations

import contextlib
import io
import socket
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType

_PATIENCE_S = 1.0  # of an engine whose lines are not taken
_MOST_BYTES = 1 << 16  # a datagram's; a longer line is several


class LogLines:
    """Writes to stderr what is sent to `path`, which nobody else on the machine can reach, while `with` lasts."""

    def __enter__(self) -> LogLines:
        self._directory = tempfile.TemporaryDirectory(prefix="vblora-log-")
        self.path = str(Path(self._directory.name, "lines"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._reader = threading.Thread(target=self._read, name="log-lines", daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        while data := self._socket.recv(_MOST_BYTES):
            # A line that cannot be written is lost. Whoever sends must not wait for a reader that has ended.
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(data.decode(errors="replace"))
                sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"", self.path)  # the end
        self._reader.join(1)
        self._socket.close()
        self._directory.cleanup()


class LineSender(io.StringIO):
    """A stream for a log handler, which writes a record at once. Lines that nobody takes any more are dropped."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(_PATIENCE_S)

    def write(self, text: str) -> int:
        data = text.encode(errors="backslashreplace")
        with contextlib.suppress(OSError):
            for start in range(0, len(data), _MOST_BYTES):
                self._socket.sendto(data[start : start + _MOST_BYTES], self._path)
        return len(text)
