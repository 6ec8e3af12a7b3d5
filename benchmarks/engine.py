"""The engine against PEFT and against its own base: throughput, decode steps, cold adapters, fairness, folding.

    python -m benchmarks.engine [--quick]

Needs PEFT. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.cold_adapter import measure_cold_adapter
from benchmarks.decode_step import measure_decode_step
from benchmarks.fairness import measure_fairness
from benchmarks.fold import measure_fold
from benchmarks.report import Target, report_line
from benchmarks.sizes import QUICK_ENGINE, EngineSizes
from benchmarks.stage import add_adapters, open_stage
from benchmarks.throughput import measure_throughput
from service.engine.threads import in_own_thread

MEASURES = ("throughput", "decode_step", "cold_adapter", "fairness", "fold")
TARGETS = (
    Target("throughput/over_peft_one_by_one/wall", at_least=8),
    Target("throughput/over_peft_by_adapter/wall", at_least=4),
    Target("decode_step/over_base/1/wall", at_most=1.03),
    Target("decode_step/over_base/4/wall", at_most=1.05),
    Target("decode_step/over_base/16/wall", at_most=1.10),
    Target("cold_adapter/first_token_idle/cold_over_warm", at_most=1.2),
    Target("cold_adapter/first_token_busy/cold_over_warm", at_most=1.2),
    Target("fairness/flooded_over_idle", at_most=3),
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    sizes = QUICK_ENGINE if options.quick else EngineSizes()
    rounds = 1 if options.quick else options.rounds
    figures: dict[str, Any] = {}
    with open_stage(sizes.model, dtype="float32", device=options.device, threads=options.threads) as stage:
        adapters = add_adapters(stage, sizes.adapter, sizes.adapters)
        if "throughput" in options.measures:
            batch = options.max_batch_size
            figures["throughput"] = measure_throughput(stage, sizes, adapters, max_batch_size=batch, rounds=rounds)
        if "decode_step" in options.measures:
            measure = partial(measure_decode_step, stage, sizes, list(adapters), rounds)
            figures["decode_step"] = in_own_thread(stage.threads, measure)
        if "cold_adapter" in options.measures:
            figures["cold_adapter"] = measure_cold_adapter(stage, sizes, list(adapters), rounds)
        if "fairness" in options.measures:
            figures["fairness"] = measure_fairness(stage, sizes, list(adapters), rounds)
        if "fold" in options.measures:
            figures["fold"] = in_own_thread(stage.threads, partial(measure_fold, stage, sizes, list(adapters), rounds))
    print(report_line("engine", sizes, figures, () if options.quick else TARGETS, options.threads))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description="Measure the engine.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that it runs, nothing more")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions that medians are taken of (3)")
    parser.add_argument("--threads", type=int, default=2, help="the threads that each contender computes with (2)")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda or auto")
    parser.add_argument("--max-batch-size", type=int, default=32, help="the engine's, for the throughput (32)")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES, help="which to take (all)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
