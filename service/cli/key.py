"""The command line of `vblora-serve key`."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.cli.command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", type=Path, metavar="FILE", help="append the line to this key file")
    parser.add_argument("--hash", action="store_true", help="read a key from stdin instead of making one")
    parser.add_argument("--name", metavar="LABEL", help="what logs call it (default: the first digits of its hash)")
    parser.add_argument(
        "--tenant", metavar="NAME", help="whose adapters it sees and changes (default: the shared ones)"
    )
    parser.add_argument("--scopes", metavar="infer,admin", help="what it may be used for (default: both)")
    parser.add_argument("--rate", metavar="N", help="requests a minute (default: no limit)")
    parser.add_argument("--concurrency", metavar="N", help="requests at once (default: no limit)")


def _run(args: argparse.Namespace) -> int:
    from service.commands import key

    names = ("name", "tenant", "scopes", "rate", "concurrency")
    attributes = [(name, getattr(args, name)) for name in names if getattr(args, name) is not None]
    return key.run(attributes, file=args.file, hash_given=args.hash)


COMMAND = Command(
    "key",
    "make an API key",
    _arguments,
    _run,
    examples=(
        "key",
        "key --file keys --name ci --tenant acme --scopes infer",
    ),
    description="Make an API key, and the line for the server's --api-key-file: its hash and what it allows.",
)
