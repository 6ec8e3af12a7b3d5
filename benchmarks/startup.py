"""From nothing to ready: a server's process against one that only loads the same model with `from_pretrained`.

    python -m benchmarks.startup [--quick]

Both are processes of their own, started in turn, their files in the operating system's cache. `plain` ends when the
model and its tokenizer are loaded and one token has been computed, as a script's first answer would be; `server` when
it listens, all its adapters registered. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import Target, report_line
from benchmarks.sizes import QUICK_STARTUP, StartupSizes
from benchmarks.stage import Stage, add_adapters, open_stage
from tests.server import Server

TARGETS = (
    Target("over_plain", at_most=1.3),
    Target("help_s", at_most=0.5),
)

_PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(int(sys.argv[2]))
AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.inference_mode():
    model(input_ids=torch.tensor([[1, 2, 3]]))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    sizes = QUICK_STARTUP if options.quick else StartupSizes()
    with open_stage(sizes.model, dtype="float32", device="cpu", threads=options.threads) as stage:
        figures = measure(stage, sizes, 1 if options.quick else options.rounds)
    print(report_line("startup", sizes, figures, () if options.quick else TARGETS, options.threads))


def measure(stage: Stage, sizes: StartupSizes, rounds: int) -> dict[str, Any]:
    """The median of the ratios of neighbours; one start of each goes before those that count."""
    adapters = add_adapters(stage, sizes.adapter, sizes.adapters)
    spent: dict[str, list[float]] = {"plain": [], "server": [], "help": []}
    for turn in range(rounds + 1):
        took = {"plain": plain(stage), "server": server(stage, adapters, turn), "help": help_text()}
        for name, seconds in took.items():
            if turn:
                spent[name].append(seconds)
    return {
        "parameters": stage.base.parameters,
        "plain_s": median(spent["plain"]),
        "server_s": median(spent["server"]),
        "help_s": median(spent["help"]),
        "over_plain": median(ours / plain for ours, plain in zip(spent["server"], spent["plain"], strict=True)),
    }


def plain(stage: Stage) -> float:
    return _run("-c", _PLAIN, str(stage.base_directory), f"{stage.threads}")


def help_text() -> float:
    return _run("-m", "service", "--help")


def _run(*arguments: str) -> float:
    began = time.perf_counter()
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # as `tests.server.Server` has it
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environ)
    return time.perf_counter() - began


def server(stage: Stage, adapters: dict[str, Path], turn: int) -> float:
    """A server with a data directory of its own: its adapters are read and checked anew."""
    began = time.perf_counter()
    with Server(
        "serve",
        *("--model", str(stage.base_directory)),
        *("--threads", f"{stage.threads}"),
        data_dir=stage.root / f"server-{turn}",
        environ={"VBLORA_ADAPTER": ",".join(f"{name}={directory}" for name, directory in adapters.items())},
    ):
        return time.perf_counter() - began


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description="Measure a server's start.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that it runs, nothing more")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each that medians are taken of (5)")
    parser.add_argument("--threads", type=int, default=2, help="the threads that each computes with (2)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
