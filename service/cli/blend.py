"""The command line of `vblora-serve blend`."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.cli.command import Command, add_json


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("members", nargs="+", metavar="DIR[:WEIGHT]", help="an adapter directory and its weight (1)")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where to write the adapter")
    parser.add_argument("--model", help="the base model: needed for adapters with biases or saved modules of their own")
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from service.commands import blend

    members = [blend.WeightedDirectory.parse(text) for text in args.members]
    return blend.run(members, output=args.output, model=args.model, as_json=args.json)


COMMAND = Command(
    "blend",
    "make one adapter of a weighted sum of several",
    _arguments,
    _run,
    examples=("blend sql:0.7 style:0.3 --output both",),
    description="Write a weighted sum of adapters as one adapter, exactly, which PEFT loads.",
)
