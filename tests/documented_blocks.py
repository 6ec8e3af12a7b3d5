"""The code in the documentation: every block of every page, and how a test runs it.

`console` blocks have their answers below each command, and are compared with them (`tests.documented`). Commands of
`sh` blocks must succeed; python blocks of one page share one namespace. Both run in the page's order, in one
working directory, against the page's server. `json`, `toml` and `yaml` are read.

What cannot run as it stands is in `tests.documented_elsewhere`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.documented import commands_in
from tests.documented_elsewhere import ELSEWHERE
from tests.server import ROOT

RUN = ("console", "sh", "python")
READ = ("json", "toml", "yaml")

_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
SERVES = "vblora-serve serve "


def pages() -> list[str]:
    """Every page of the documentation, as a path from the root."""
    patterns = ("README.md", "SECURITY.md", "docs/**/*.md", "deploy/**/*.md", "examples/**/README.md")
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


@dataclass(frozen=True)
class Block:
    """One fenced block. `language` is empty where it is plain text; `span` is where it stands on its page."""

    page: str
    language: str
    text: str
    span: tuple[int, int]

    @property
    def commands(self) -> list[str]:
        """What the block has to run, piece by piece; nothing if it is only read."""
        if self.language == "console":
            return [command.text for command in commands_in(self.text)]
        if self.language == "sh":
            return list(_lines(self.text))
        return [self.text] if self.language == "python" else []

    def runs(self) -> Iterator[str]:
        """The commands that are not left to another test."""
        return (command for command in self.commands if elsewhere(self.page, command) is None)


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(page, match[2].strip(), match[3], match.span()) for match in _FENCE.finditer(text)]


def elsewhere(page: str, command: str) -> str | None:
    """The entry of the table that a command has: how it begins, None if it has none."""
    return next((entry for entry in ELSEWHERE.get(page, {}) if command.startswith(entry)), None)


def _lines(block: str) -> Iterator[str]:
    """The commands of an sh block: a line, with those that it goes on in."""
    command = ""
    for line in block.splitlines():
        command = f"{command}\n{line}" if command else line
        if command.rstrip().endswith("\\") or not _closed(command):
            continue
        if command.strip() and not command.lstrip().startswith("#"):
            yield command
        command = ""
    assert not command, f"this goes on after the end of its block: {command}"


def _closed(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def own_server(page: str) -> list[str] | None:
    """What the page's first command starts a server with, where the server is the page's subject."""
    if page != "docs/quickstart.md":
        return None
    commands = [command for block in blocks_of(page) for command in block.commands]
    [start] = [command for command in commands if command.startswith(SERVES)]
    return shlex.split(start)[1:]
