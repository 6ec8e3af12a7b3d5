"""The command line of `vblora-serve serve`."""

from __future__ import annotations

import argparse

from service.cli.command import Command
from service.cli.settings_flags import add_settings, settings_of
from service.commands import UsageError


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)


def _run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    if settings.model is None:
        raise UsageError("no base model is given; set --model or VBLORA_MODEL to a directory or a Hub id")
    from service.commands import serve

    return serve.run(settings)


COMMAND = Command(
    "serve",
    "start the server",
    _arguments,
    _run,
    examples=(
        "serve --model path/or/hub-id --adapter sql=path/to/adapter",
        "serve --config server.toml --port 8080",
    ),
    description="Start the server. Every setting may also be a VBLORA_… variable or a key of --config.",
)
