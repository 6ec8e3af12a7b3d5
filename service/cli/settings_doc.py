"""The command line of `vblora-serve settings-doc`, which is for this project's own use: it is in no list."""

from __future__ import annotations

import argparse

from service.cli.command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def _run(args: argparse.Namespace) -> int:
    from service.commands import settings_doc

    return settings_doc.run()


COMMAND = Command("settings-doc", "", _arguments, _run, description="Write docs/settings.md to standard output.")
