"""One process owns a data directory."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from adapters.errors import StoreError


class DirectoryLock:
    """An exclusive lock on `data_dir/lock`, held until `release` or the end of the process, however it ends.

    Raises StoreError when somebody else holds it. The file stays, with the last owner's process id: only the
    kernel's lock on it counts, so a stale file blocks nobody.
    """

    def __init__(self, data_dir: Path) -> None:
        self._descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            raise StoreError(
                f"the data directory {data_dir} is in use by another process (id {owner}): "
                "stop that one, or give this one a data directory of its own"
            ) from None
        except BaseException:
            os.close(self._descriptor)
            raise
        with suppress(OSError):  # a courtesy to whoever is refused; a full disk must not stop the owner
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, b"%d\n" % os.getpid())

    def release(self) -> None:
        os.close(self._descriptor)
