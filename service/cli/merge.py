"""The command line of `vblora-serve merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.cli.command import Command, add_json
from service.commands import UsageError
from service.setting_kinds import BYTES


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("members", nargs="+", metavar="DIR[:WEIGHT]", help="an adapter directory and its weight (1)")
    parser.add_argument("--model", required=True, help="the base model: a directory or a Hub id")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where to write the merged model")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="auto keeps the base's own (default: auto)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a file at most (default: 5GB)")
    parser.add_argument(
        "--base-alias", action="append", default=[], metavar="ID", help="another name of the base; may be repeated"
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    try:
        shard_bytes = BYTES.parse(args.shard_size)
    except ValueError:
        raise UsageError(f"--shard-size is {args.shard_size!r}; expected {BYTES.expected}") from None
    from service.commands import merge
    from service.commands.blend import WeightedDirectory

    options = merge.MergeOptions(
        model=args.model,
        members=tuple(WeightedDirectory.parse(text) for text in args.members),
        output=args.output,
        dtype=args.dtype,
        shard_bytes=shard_bytes,
        base_aliases=tuple(args.base_alias),
        as_json=args.json,
    )
    return merge.run(options)


COMMAND = Command(
    "merge",
    "write the base model with adapters folded into its weights",
    _arguments,
    _run,
    examples=(
        "merge my-adapter --model path/or/hub-id --output merged",
        "merge sql:0.7 style:0.3 --model path/or/hub-id --dtype bfloat16 --output merged",
    ),
    description=(
        "Write the base model with a weighted sum of adapters folded into its weights, as a directory that "
        "transformers loads. Works tensor by tensor: the model need not fit into memory."
    ),
)
