"""Spinners and bars: on a terminal, and nowhere else."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, redirect_stderr

import pytest

from service.commands.progress import Advance, counting, hidden_progress, transferring, working


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def work(stderr: io.StringIO) -> None:
    with redirect_stderr(stderr):
        bars: list[AbstractContextManager[Advance]] = [counting("Counting", 3), transferring("Sending", 2048)]
        for bar in bars:
            with bar as advance:
                advance(1)
        with working("Reading [bold]x"):
            pass


def test_on_a_terminal(terminal: Terminal) -> None:
    work(terminal)
    assert all(word in terminal.getvalue() for word in ("Counting", "1/3", "Sending", "kB", "Reading [bold]x"))


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_not_on_one_that_is_to_stay_plain(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    work(terminal)
    assert terminal.getvalue() == ""


def test_not_beside_json(terminal: Terminal) -> None:
    with hidden_progress():
        work(terminal)
        with hidden_progress(False):
            work(terminal)
    assert terminal.getvalue() == ""
    work(terminal)
    assert terminal.getvalue()


def test_not_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = io.StringIO()
    work(pipe)
    assert pipe.getvalue() == ""
    assert capsys.readouterr() == ("", "")
