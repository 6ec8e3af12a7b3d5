"""The command line of `vblora-serve init`."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.cli.command import Command, add_json
from service.commands import UsageError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the base model; only its config is read")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write the adapter")
    parser.add_argument("--dry-run", action="store_true", help="only print the parameter counts")
    for name, default, text in (
        ("r", 4, "the rank"),
        ("num-vectors", 256, "vectors in the bank"),
        ("vector-length", 256, "features of a vector; it must divide those of every layer adapted"),
        ("topk", 2, "vectors that are mixed into one tile"),
        ("seed", 0, "what the initial values are drawn from"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--target-modules", metavar="WHICH", help="names with commas, a regular expression, or all-linear"
    )
    parser.add_argument("--init-vector-bank-bound", type=float, default=0.02, metavar="X", help="default: 0.02")
    parser.add_argument("--init-logits-std", type=float, default=0.1, metavar="X", help="default: 0.1")
    parser.add_argument("--base-name", metavar="ID", help="the base's name in the config (default: its Hub id, if any)")
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    if args.output is None and not args.dry_run:
        raise UsageError("give --output DIR to write the adapter, or --dry-run to see its parameter counts")
    from service.commands import init

    names = ("r", "num_vectors", "vector_length", "topk", "init_vector_bank_bound", "init_logits_std")
    options = init.InitOptions(
        model=args.model,
        fields={name: getattr(args, name) for name in names},
        target_modules=args.target_modules,
        base_name=args.base_name,
        seed=args.seed,
        output=None if args.dry_run else args.output,
        as_json=args.json,
    )
    return init.run(options)


COMMAND = Command(
    "init",
    "write a fresh adapter for PEFT to train",
    _arguments,
    _run,
    examples=(
        "init --model path/or/hub-id --dry-run",
        "init --model path/or/hub-id --r 4 --target-modules q_proj,v_proj --output fresh",
    ),
    description="Write a fresh VB-LoRA adapter with full logits, which PEFT loads and trains.",
)
