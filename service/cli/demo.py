"""The command line of `vblora-serve demo`."""

from __future__ import annotations

import argparse

from service.cli.command import Command
from service.cli.settings_flags import add_settings, settings_of

_SETTINGS = frozenset({"host", "port", "device", "data_dir", "log_format", "log_level"})


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="exit 1 unless every adapter writes in its own style")
    parser.add_argument("--no-serve", action="store_true", help="show what the adapters do, and end")
    add_settings(parser, _SETTINGS)


def _run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    from service.demo import run

    return run.main(settings, check=args.check, serve=not args.no_serve)


COMMAND = Command(
    "demo",
    "serve the small model and the adapters that come with the package",
    _arguments,
    _run,
    examples=(
        "demo",
        "demo --check",
    ),
    description="Serve the small base model and the adapters that come with the package. Needs no network.",
)
