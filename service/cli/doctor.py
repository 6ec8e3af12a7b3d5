"""The command line of `vblora-serve doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.cli.command import Command, add_json
from service.setting_kinds import ENDPOINT, SECONDS, STORE, Kind


def _arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data-dir", type=Path, metavar="PATH", help="the server's --data-dir")
    where.add_argument("--store", type=_read_as(STORE), metavar="URL", help="the servers' --store")
    parser.add_argument(
        "--store-endpoint", type=_read_as(ENDPOINT), metavar="URL", help="the servers' --store-endpoint"
    )
    parser.add_argument(
        "--grace-s", type=_read_as(SECONDS), default=3600.0, metavar="SECONDS",
        help="how long files of a shared store must have been without a name to be removed (default: 3600)",
    )  # fmt: skip
    parser.add_argument("--repair", action="store_true", help="mend it; nothing that is intact and named is removed")
    add_json(parser)


def _read_as(kind: Kind) -> Callable[[str], Any]:
    """An argument's type: read as a setting of that kind is."""

    def read(text: str) -> Any:
        try:
            return kind.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind.expected}") from error

    return read


def _run(args: argparse.Namespace) -> int:
    from service.commands import doctor

    if args.store is not None:
        return doctor.run_shared(
            args.store, args.store_endpoint, grace_s=args.grace_s, mend=args.repair, as_json=args.json
        )
    return doctor.run(args.data_dir, mend=args.repair, as_json=args.json)


COMMAND = Command(
    "doctor",
    "check the directory or the store that adapters are kept in, and repair it",
    _arguments,
    _run,
    examples=(
        "doctor --data-dir /data",
        "doctor --data-dir /data --repair",
        "doctor --store s3://my-bucket/vblora --repair",
    ),
    description="Check a server's data directory while no server runs on it, or a store that servers share while they "
    "do. Exit code 1: something is wrong.",
)
