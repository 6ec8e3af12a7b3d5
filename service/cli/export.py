"""The command line of `vblora-serve export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.cli.command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="a PEFT adapter directory")
    parser.add_argument(
        "--format", required=True, choices=["topk", "logits", "lora"], help="topk: compact; lora: plain LoRA"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where to write the adapter")


def _run(args: argparse.Namespace) -> int:
    from service.commands import export

    return export.run(args.directory, format=args.format, output=args.output)


COMMAND = Command(
    "export",
    "convert an adapter: compact, full logits, or plain LoRA",
    _arguments,
    _run,
    examples=(
        "export my-adapter --format lora --output my-lora",
        "export trained --format topk --output compact",
    ),
    description="Write an adapter compact, with full logits, or as plain LoRA, as a directory that PEFT loads.",
)
