"""Replayed decode steps on a GPU: first whether they answer rightly, then what they take, in one run.

    python -m benchmarks.decode_graphs [--checks | --quick]

Checks an engine under a flood of requests, against one without graphs, in float32 and bfloat16: the same tokens, and
nothing captured after the start. Then times decode steps of a 7B Llama with random weights in bfloat16 at several sizes
of batch: the base's own, with an adapter in every row by either pair of kernels, with 10,000 adapters in the tables;
and what a cold adapter costs. Needs torch, transformers, safetensors and Triton alone.

Without a CUDA device it says so and has no figures. `--quick` needs none: tiny sizes, replays that call the step again,
and a reference in the kernels' place. It shows that this runs, and its times mean nothing. Ends in one line of JSON;
with status 1 if a check failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.graph_checks import check_tokens
from benchmarks.graph_steps import Steps, random_base
from benchmarks.report import report_line
from benchmarks.sizes import QUICK_GRAPHS, GraphSizes
from service.engine.graphs.capture import CudaGraphs, GraphBackend, Recorded


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    sizes = QUICK_GRAPHS if options.quick else GraphSizes()
    figures: dict[str, Any] = {}
    failed: list[str] = []
    if options.quick or torch.cuda.is_available():
        device = "cpu" if options.quick else "cuda"
        backend: Callable[[], GraphBackend] | None = Recorded if options.quick else None
        dtypes = ("float32",) if options.quick else ("float32", "bfloat16")
        figures["tokens"] = {dtype: check_tokens(sizes, dtype, device, backend) for dtype in dtypes}
        failed = [f"{dtype}, {k}" for dtype, by in figures["tokens"].items() for k, v in by.items() if not v["passed"]]
        if not options.checks:
            figures |= measure(sizes, torch.device(device), backend, 2 if options.quick else options.rounds)
    else:
        figures["skipped"] = "needs a CUDA device; --quick runs tiny sizes without graphs"
    figures["failed"] = failed
    print(report_line("decode_graphs", sizes, figures, (), torch.get_num_threads()))
    return 1 if failed else 0


def measure(
    sizes: GraphSizes, device: torch.device, backend: Callable[[], GraphBackend] | None, rounds: int
) -> dict[str, Any]:
    base = random_base(sizes.model, "bfloat16" if device.type == "cuda" else "float32", device)
    steps = Steps(base, sizes, backend() if backend else CudaGraphs(device), rounds)
    return {
        "steps": steps.measure(),
        "faster_pair": steps.faster_pair().value,
        "resident": steps.resident(),
        "cold_adapter": steps.cold(),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_graphs", description="Check and time replays.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on a CPU: shows that it runs, nothing more")
    parser.add_argument("--checks", action="store_true", help="checks alone")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each kind that medians are taken of (30)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
