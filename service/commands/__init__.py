"""What each subcommand of `vblora-serve` does. Most import torch: `service.cli` imports one only to run it."""

from __future__ import annotations


class CommandError(Exception):
    """A command cannot do what was asked; the message says why and what to do."""


class UsageError(Exception):
    """The command line cannot be understood, or lacks something that the command needs."""
