"""The kernels of the low-rank part, checked and timed on a GPU beside the base's own products.

    python -m benchmarks.kernels [--checks | --quick]

Checks every case against float64, and the replay of a captured graph after its batch and adapters have changed. Then
times one layer of a 7B Llama, bfloat16, 64 adapters: its products alone, and with each pair of kernels, each a captured
graph, turn about. The layer's weights are larger than the cache, so kernels find there what they would in a model.

Without a CUDA device it says so and has no figures. `--quick` needs none: it runs a few checks in Triton's interpreter.
Ends in one line of JSON; with status 1 if a check failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.kernels import reference
from adapters.kernels.delta import Pair
from adapters.kernels.tables import BankTable
from benchmarks.kernel_bytes import ADAPTED, BANDWIDTHS, LLAMA_7B, StepBytes
from benchmarks.kernel_cases import CHECKED, KernelCase, KernelGroup, build, tolerance
from benchmarks.report import report_line
from benchmarks.sizes import AdapterShape

QUICK = ("plain", "tiles of 3", "bfloat16")
UNCHANGED = "q and v"  # where k is left to the base


@dataclass(frozen=True, slots=True)
class KernelSizes:
    adapter: AdapterShape = field(default_factory=AdapterShape)
    adapters: int = 64
    rows: tuple[int, ...] = (1, 16, 64)
    repeats: int = 4  # of the layer in a graph


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    sizes, cuda = KernelSizes(), torch.cuda.is_available()
    figures: dict[str, Any] = {}
    if cuda and not options.quick:
        figures["checks"] = {name: check(case, "cuda") for name, case in CHECKED.items()}
        figures["replay"] = {pair.value: check_replay(pair) for pair in Pair}
        if not options.checks:
            figures["layer"] = {name: measure_layer(name, sizes, options.rounds) for name in ADAPTED}
    elif options.quick:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, which the first check does
        figures["checks"] = {name: check(CHECKED[name], "cpu") for name in QUICK}
    else:
        figures["skipped"] = "needs a CUDA device; --quick checks a few cases in Triton's interpreter"
    failed = [name for name, checked in figures.get("checks", {}).items() if not checked["passed"]]
    failed += [f"replay, {name}" for name, passed in figures.get("replay", {}).items() if not passed]
    figures["failed"] = failed
    print(report_line("kernels", sizes, figures, (), torch.get_num_threads()))
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="Check and time the kernels.")
    parser.add_argument("--quick", action="store_true", help="a few checks in Triton's interpreter, no GPU")
    parser.add_argument("--checks", action="store_true", help="checks alone, on a GPU")
    parser.add_argument("--rounds", type=int, default=30, help="replays of each graph that medians are taken of (30)")
    return parser.parse_args(arguments)


# --- checks ---------------------------------------------------------------------------------------


def check(case: KernelCase, device: str) -> dict[str, Any]:
    """Both pairs' largest error, over the largest output, and whether it is no more than rounding."""
    group = build(case, device=device)
    errors = {pair.value: group.error(pair) for pair in Pair}
    return {**errors, "passed": all(error < tolerance(case.dtype, device) for error in errors.values())}


def check_replay(pair: Pair) -> bool:
    """A graph captured for one batch computes another, of other adapters, once the tables were rewritten."""
    group, other = build(CHECKED["plain"], device="cuda"), build(CHECKED["plain"], device="cuda", seed=1)
    delta, output = group.delta(pair), group.output()
    replay = captured(lambda: delta.write(output, group.x))
    group.rows.slots.copy_(other.rows.slots)
    group.rows.weights.copy_(other.rows.weights)
    for slot, (checkpoint, names) in enumerate(zip(other.checkpoints, other.names, strict=True)):
        group.put(slot, checkpoint, names)
    group.x.copy_(other.x)
    replay()
    exact = reference.delta(other.x, other.table(pair), other.rows)
    return float((output.double() - exact).abs().max() / exact.abs().max()) < tolerance(torch.float32, "cuda")


# --- timing ---------------------------------------------------------------------------------------


def measure_layer(adapted: str, sizes: KernelSizes, rounds: int) -> dict[str, Any]:
    """One layer's products at each number of rows, alone and with each pair: microseconds, and what a pair adds."""
    groups = layer_groups(adapted, sizes)
    weights = {name: torch.randn(g.total_out, g.in_features, device="cuda").bfloat16() for name, g in LLAMA_7B.items()}
    figures: dict[str, Any] = {"launches": 2 * len(groups)}
    for rows in sizes.rows:
        ways = {"base": layer(weights, {}, rows, sizes.repeats)}
        ways |= {pair.value: layer(weights, groups, rows, sizes.repeats, pair) for pair in Pair}
        took = turn_about({name: captured(run) for name, run in ways.items()}, rounds)
        figures[f"rows_{rows}"] = {
            **{f"{name}_us": took[name] / sizes.repeats for name in took},
            **{f"{p.value}_adds_us": (took[p.value] - took["base"]) / sizes.repeats for p in Pair},
            **{f"{p.value}_over_base": took[p.value] / took["base"] for p in Pair},
            "floor_us": floors(adapted, sizes, rows),
        }
    return figures


def layer_groups(adapted: str, sizes: KernelSizes) -> Mapping[str, KernelGroup]:
    """The adapted groups of a layer, all on the same banks."""
    shape = sizes.adapter
    banks = BankTable(sizes.adapters, shape.num_vectors, shape.vector_length, dtype=torch.bfloat16, device="cuda")
    groups = {}
    for name in LLAMA_7B if adapted != UNCHANGED else ("qkv",):
        case = KernelCase(
            LLAMA_7B[name].in_features,
            LLAMA_7B[name].out_features,
            rank=shape.r,
            num_vectors=shape.num_vectors,
            vector_length=shape.vector_length,
            topk=shape.topk,
            slots=sizes.adapters,
            rows=max(sizes.rows),
            members=1,
            dtype=torch.bfloat16,
            table=torch.bfloat16,
            mixed=False,
        )
        groups[name] = group = build(case, device="cuda", banks=banks)
        if adapted == UNCHANGED:
            for table in (group.selections, group.factors):
                table.ranks[:, 1] = 0
    return groups


def layer(
    weights: Mapping[str, Tensor], groups: Mapping[str, KernelGroup], rows: int, repeats: int, pair: Pair | None = None
) -> Callable[[], None]:
    """The layer's products, some times over, each followed by its low-rank part if it has one."""
    inputs = {name: torch.randn(rows, weight.shape[1], device="cuda").bfloat16() for name, weight in weights.items()}
    deltas = {} if pair is None else {name: group.delta(pair) for name, group in groups.items()}

    def run() -> None:
        for _ in range(repeats):
            for name, weight in weights.items():
                output = F.linear(inputs[name], weight)
                if name in deltas:
                    deltas[name].add_to(output, inputs[name])

    return run


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """The replay of what `run` launches; it has run before, so that its kernels are compiled."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def turn_about(replays: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median of each one's microseconds, by the device's own clock."""
    spent: dict[str, list[float]] = {name: [] for name in replays}
    for counted in (False, *[True] * rounds):
        for name, replay in replays.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            if counted:
                spent[name].append(1000 * start.elapsed_time(end))
    return {name: median(each) for name, each in spent.items()}


def floors(adapted: str, sizes: KernelSizes, rows: int) -> dict[str, dict[str, float]]:
    """What a layer's bytes take at each card's bandwidth."""
    adapters = min(rows, sizes.adapters)
    step = StepBytes.of(ADAPTED[adapted], sizes.adapter, rows=rows, adapters=adapters, layers=1)
    read = {
        "base": step.base,
        "gathered": step.gathered,
        "bank_direct": step.selections,  # and the banks: between not at all and at each launch
        "bank_direct_banks": step.banks_each_launch,
    }
    return {gpu: {name: 1e6 * size / speed for name, size in read.items()} for gpu, speed in BANDWIDTHS.items()}


if __name__ == "__main__":
    sys.exit(main())
