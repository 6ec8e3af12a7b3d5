"""The command line of `vblora-serve push`."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.cli.command import Command, add_json, check_url
from service.commands import UsageError
from service.settings import API_KEY_VARIABLE, load_api_key

MOST_PARALLEL = 64


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directories", type=Path, nargs="+", metavar="DIR", help="an adapter's directory, or one that holds some"
    )
    parser.add_argument("--url", required=True, help="the server, for example http://127.0.0.1:8000")
    parser.add_argument("--name", help="what to call the adapter, if there is only one")
    parser.add_argument("--replace", action="store_true", help="make a new version where the server has other files")
    parser.add_argument("--parallel", type=int, default=4, metavar="N", help="uploads at a time (default: 4)")
    parser.add_argument("--api-key-file", type=Path, metavar="PATH", help="a file whose first line is the API key")
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    check_url("--url", args.url)
    if not 1 <= args.parallel <= MOST_PARALLEL:
        raise UsageError(f"--parallel is {args.parallel}; give a number from 1 to {MOST_PARALLEL}")
    from service.commands import push

    options = push.PushOptions(
        directories=tuple(args.directories),
        url=args.url,
        name=args.name,
        replace=args.replace,
        parallel=args.parallel,
        api_key=load_api_key(args.api_key_file),
        as_json=args.json,
    )
    return push.run(options)


COMMAND = Command(
    "push",
    "upload many adapters to a server",
    _arguments,
    _run,
    examples=(
        "push my-adapter --url http://127.0.0.1:8000",
        "push all-adapters --url http://127.0.0.1:8000 --replace --parallel 8",
    ),
    description=(
        "Upload adapters to a server, those that it does not have already. Each is called as its directory. "
        f"The API key, if the server asks for one, comes from {API_KEY_VARIABLE} or --api-key-file."
    ),
)
