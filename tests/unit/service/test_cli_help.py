"""The help: of every command, with examples that the command line takes, as wide as the terminal."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from service.cli import COMMANDS, main, make_parser
from service.cli.command import Command
from service.setting_groups import GROUPS, OTHERS, grouped
from service.settings import SETTINGS

LISTED = [command for command in COMMANDS if command.summary]
DOCS = Path(__file__).parents[3] / "docs" / "cli.md"


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words, "--help"]) == 0
    return capsys.readouterr().out


def test_nothing_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == help_of(capsys)


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = help_of(capsys).splitlines()
    for command in LISTED:
        assert any(line.split(maxsplit=1) == [command.name, command.summary] for line in lines)
    assert len(LISTED) == len(COMMANDS) - 1, "settings-doc is for nobody else"


@pytest.mark.parametrize("command", LISTED, ids=lambda command: command.name)
def test_examples_are_understood(command: Command) -> None:
    assert 1 <= len(command.examples) <= 4
    for example in command.examples:
        args, unknown = make_parser().parse_known_args(shlex.split(example))
        assert not unknown
        assert args.run is command.run


@pytest.mark.parametrize("command", LISTED, ids=lambda command: command.name)
@pytest.mark.parametrize("columns", [60, 100])
def test_help_is_as_wide_as_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: Command, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text, _, examples = help_of(capsys, command.name).partition("\nexamples:\n")
    _, _, explained = text.partition("\n\n")  # in the usage, a group of flags is one word to argparse
    too_long = [line for line in explained.splitlines() if len(line) > columns and len(line.split()) > 2]
    assert not too_long
    assert [line.strip() for line in examples.splitlines()] == [f"vblora-serve {each}" for each in command.examples]


def test_help_as_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "bench"]) == 0
    assert capsys.readouterr().out == help_of(capsys, "bench")
    assert main(["help"]) == 0
    assert capsys.readouterr().out == help_of(capsys)


def test_every_setting_is_in_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(setting.name for setting in SETTINGS)
    assert OTHERS not in dict(grouped())
    text = help_of(capsys, "serve")
    at = [text.index(f"\n{title}:\n") for title in GROUPS]
    assert at == sorted(at)
    assert text.index("\nlogs:\n") < text.index("  --log-level ")


def test_every_command_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for command in LISTED:
        assert f"\n## {command.name}\n" in text
        assert f"vblora-serve {command.name}" in text
