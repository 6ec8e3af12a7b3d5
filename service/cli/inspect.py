"""The command line of `vblora-serve inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.cli.command import Command, add_json


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="a PEFT adapter directory")
    parser.add_argument("--model", help="hold it against this base model too (only its config is read)")
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from service.commands import inspect

    return inspect.run(args.directory, model=args.model, as_json=args.json)


COMMAND = Command(
    "inspect",
    "validate an adapter and print its parameter count",
    _arguments,
    _run,
    examples=(
        "inspect my-adapter",
        "inspect my-adapter --model path/or/hub-id",
        "inspect my-adapter --json",
    ),
    description="Validate an adapter directory as an upload would be, and print what is in it.",
)
