"""The command line of `vblora-serve doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.cli.command import Command, add_json


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, required=True, metavar="PATH", help="the server's --data-dir")
    parser.add_argument("--repair", action="store_true", help="mend it; nothing that is intact is removed")
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from service.commands import doctor

    return doctor.run(args.data_dir, mend=args.repair, as_json=args.json)


COMMAND = Command(
    "doctor",
    "check the directory that adapters are kept in, and repair it",
    _arguments,
    _run,
    examples=(
        "doctor --data-dir /data",
        "doctor --data-dir /data --repair",
    ),
    description="Check a server's data directory while no server runs on it. Exit code 1: something is wrong.",
)
