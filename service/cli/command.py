"""What a subcommand is to the command line: a name, a line about it, its arguments, and what runs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn
from urllib.parse import urlsplit

from service.commands import UsageError

PROGRAM = "vblora-serve"
_HELP_COLUMN = 32


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand. `arguments` adds its flags to a parser; `run` gets them parsed and returns the exit code.

    `summary` stands in the list of commands, `description` (by default the same) and `examples` in its own help.
    One without a summary is in no list.
    """

    name: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    examples: tuple[str, ...] = ()
    description: str = ""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps to the terminal's width, all but the examples, which are to be copied."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_HELP_COLUMN)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse prints its usage and exits, and never guesses at abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=Formatter)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def unknown(self, word: str) -> UsageError:
        """The error of a word that is none of this command's."""
        flag = word.partition("=")[0]
        text = f"{flag} is not understood here" + did_you_mean(flag, list(self._option_string_actions))
        return UsageError(f"{text}; see {self.prog} --help")


def check_url(name: str, url: str) -> None:
    """Raises UsageError for what is no address of a server."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"{name} is {url!r}; give the server's address, such as http://127.0.0.1:8000")


def did_you_mean(word: str, known: list[str]) -> str:
    """`: did you mean --port?`, or nothing if nothing known is near."""
    near = get_close_matches(word, known, n=1)
    return f": did you mean {near[0]}?" if near else ""


def add_command(commands: Any, command: Command) -> None:
    """Adds a subcommand to those of a parser."""
    options: dict[str, Any] = {"description": command.description or f"{command.summary.capitalize()}."}
    if command.examples:
        options["epilog"] = "\n".join(["examples:", *(f"  {PROGRAM} {example}" for example in command.examples)])
    if command.summary:
        options["help"] = command.summary
    parser: Parser = commands.add_parser(command.name, **options)
    command.arguments(parser)
    parser.set_defaults(run=command.run, parser=parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
