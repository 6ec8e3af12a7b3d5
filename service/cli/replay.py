"""The command line of `vblora-serve replay`."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.cli.command import Command, add_json
from service.commands import UsageError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("receipt", type=Path, metavar="RECEIPT", help="a JSON file: the receipt, or the whole answer")
    parser.add_argument("--model", required=True, help="the base model: a directory, or a Hub id")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="an adapter of the receipt (repeatable)"
    )
    parser.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="the prompt, as text or as a JSON list of token ids, where the receipt has only its hash",
    )
    parser.add_argument(
        "--device", default="auto", metavar="{auto,cpu,cuda}", help="what to compute on (default: auto)"
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    adapters = []
    for given in args.adapter:
        name, _, directory = given.partition("=")
        if not (name and directory):
            raise UsageError(f"--adapter is {given!r}; expected NAME=DIRECTORY")
        adapters.append((name, Path(directory)))
    from service.commands import replay

    options = replay.ReplayOptions(
        receipt=args.receipt,
        model=args.model,
        adapters=tuple(adapters),
        prompt_file=args.prompt_file,
        device=args.device,
        as_json=args.json,
    )
    return replay.run(options)


COMMAND = Command(
    "replay",
    "recompute an answer from its receipt, with PEFT",
    _arguments,
    _run,
    examples=("replay answer.json --model path/or/hub-id --adapter sql=path/to/sql",),
    description=(
        "Recompute an answer from its receipt with transformers and PEFT, and name the first token that differs. "
        "Exit code 0 if it is equal, 1 if anything differs."
    ),
)
