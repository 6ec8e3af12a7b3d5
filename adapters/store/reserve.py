"""Room kept back for deletions."""

from __future__ import annotations

import os
from pathlib import Path

SIZE = 1 << 20


class Reserve:
    """A file that only takes up room. Forgetting an adapter needs some before it frees any; on a full disk, this."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fill(self) -> None:
        """Take the room if it is there to take."""
        if self._path.exists():
            return
        try:
            with open(self._path, "xb", opener=_private) as file:
                file.write(os.urandom(SIZE))  # nothing that a file system could compress or leave as a hole
        except OSError:
            self.release()

    def release(self) -> None:
        """Give the room to whoever comes next."""
        self._path.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
