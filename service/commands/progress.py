"""What is under way, on a terminal's stderr: spinners and bars. Nothing in a pipe, and nothing beside --json."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from service.logs import draws

Advance = Callable[[int], None]

_hidden = ContextVar("hidden", default=False)


@contextmanager
def hidden_progress(hidden: bool = True) -> Iterator[None]:
    """Within the block nothing is shown, if so asked."""
    token = _hidden.set(hidden or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner, for what cannot say how far it is."""
    if not _is_shown():
        yield
        return
    with Console(file=sys.stderr).status(escape(what)):
        yield


def counting(what: str, total: int) -> AbstractContextManager[Advance]:
    """A bar of things done. Gives what to call with how many more are."""
    return _bar(what, total, MofNCompleteColumn())


def transferring(what: str, total: int) -> AbstractContextManager[Advance]:
    """A bar of bytes. Gives what to call with the bytes of each part that is done."""
    return _bar(what, total, DownloadColumn())


@contextmanager
def _bar(what: str, total: int, amount: ProgressColumn) -> Iterator[Advance]:
    columns = TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn()
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=not _is_shown()) as bar:
        task = bar.add_task(escape(what), total=total)
        yield lambda done: bar.advance(task, done)


def _is_shown() -> bool:
    return draws(sys.stderr) and not _hidden.get()
