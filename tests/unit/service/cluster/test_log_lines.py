"""Log lines of other processes, and a stderr that takes none for a while."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from service.cluster.log_lines import LineSender, LogLines


class Stderr(io.StringIO):
    """Fails at the first line, as a full disk does, and takes what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = False
        self.last = threading.Event()

    def write(self, text: str) -> int:
        if not self.failed:
            self.failed = True
            raise OSError(28, "No space left on device")
        done = super().write(text)
        if "last" in text:
            self.last.set()
        return done


def test_a_line_that_cannot_be_written_is_lost_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Stderr()
    monkeypatch.setattr(sys, "stderr", stderr)
    with LogLines() as lines:
        sender = LineSender(lines.path)
        for number in range(50):
            sender.write(f"line {number}\n")
        sender.write("last\n")
        assert stderr.last.wait(10)
    assert stderr.failed
    assert "line 49\n" in stderr.getvalue()
