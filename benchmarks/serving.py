"""This server over HTTP, side by side with what else one could put behind HTTP, on the same weights and requests.

    python -m benchmarks.serving [--quick] [--plot DIRECTORY]

- `server`: `vblora-serve serve`;
- `peft_switching`: PEFT and `generate`, a request at a time, `set_adapter` for each;
- `peft_grouped`: the same, with those that wait for one adapter in a padded batch;
- `transformers_continuous`: transformers' continuous batching with one adapter merged into the weights. It serves that
  one only, so that it is met in `one_adapter` alone.

Linux only: it reads /proc. Needs PEFT. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.contenders.lineup import CONTINUOUS, PEFT_GROUPED, PEFT_SWITCHING, SERVER, open_lineup
from benchmarks.floor import measure_floor
from benchmarks.loops import measure_closed_loop, measure_http_over_engine, measure_open_loop
from benchmarks.plot import first_token_plot, memory_plot
from benchmarks.report import Target, report_line
from benchmarks.server_memory import measure_memory
from benchmarks.sizes import QUICK_SERVING, ServingSizes
from benchmarks.stage import Stage, add_adapters, open_stage, selections
from benchmarks.step_growth import measure_step_growth
from service.engine.threads import in_own_thread

MEASURES = ("closed_loop", "one_adapter", "open_loop", "http_over_engine", "step_growth", "memory")
_MET_IN = {  # the contenders that a measure asks, besides the server
    "closed_loop": (PEFT_SWITCHING, PEFT_GROUPED),
    "one_adapter": (CONTINUOUS,),
    "open_loop": (PEFT_SWITCHING, PEFT_GROUPED),
    "http_over_engine": (),
}
TARGETS = (
    Target("closed_loop/over_peft_switching/throughput", at_least=8),
    Target("closed_loop/over_peft_switching/first_token_p50", at_most=0.05),
    Target("http_over_engine/wall", at_most=1.05),
    Target("step_growth/over_one/64", at_most=1.15),
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    sizes = QUICK_SERVING if options.quick else full_sizes(options)
    rounds = 1 if options.quick else options.rounds
    with open_stage(sizes.model, dtype=options.dtype, device="cpu", threads=options.threads) as stage:
        figures = measure(stage, sizes, options.measures, rounds)
    if options.plot is not None:
        draw(figures, options.plot)
    print(report_line("serving", sizes, figures, () if options.quick else TARGETS, options.threads))


def measure(stage: Stage, sizes: ServingSizes, measures: Iterable[str], rounds: int) -> dict[str, Any]:
    floor = measure_floor(stage, sizes.model)
    wanted = [name for name in MEASURES if name in measures]
    needed = max(sizes.adapters, sizes.step_adapters[-1] if "step_growth" in wanted else 0)
    adapters = add_adapters(stage, sizes.adapter, needed)
    figures: dict[str, Any] = {"machine_floor": floor.described()}
    if "step_growth" in wanted:
        run = partial(measure_step_growth, stage, sizes, list(adapters), floor, rounds)
        figures["step_growth"] = in_own_thread(stage.threads, run)
    if served := [name for name in wanted if name in _MET_IN]:
        used = dict(islice(adapters.items(), sizes.adapters))
        chosen = selections(stage, list(used))
        contenders = dict.fromkeys(name for measure in served for name in _MET_IN[measure])
        with open_lineup(stage, sizes, used, list(contenders)) as endpoints:
            for name in served:
                met = {one: endpoints[one] for one in (SERVER, *_MET_IN[name])}
                if name == "http_over_engine":
                    figures[name] = measure_http_over_engine(stage, sizes, met[SERVER], chosen, floor, rounds)
                elif name == "open_loop":
                    figures[name] = measure_open_loop(name, sizes, met, chosen, floor, rounds)
                else:
                    of = chosen[:1] if name == "one_adapter" else chosen
                    figures[name] = measure_closed_loop(name, sizes, met, of, floor, rounds)
    if "memory" in wanted:
        figures["memory"] = measure_memory(stage, sizes)
    return figures


def full_sizes(options: argparse.Namespace) -> ServingSizes:
    sizes = replace(ServingSizes(), requests=options.requests, arrivals=options.arrivals)
    return sizes if options.offered is None else replace(sizes, offered=tuple(options.offered))


def draw(figures: Mapping[str, Any], directory: Path) -> None:
    for name, plot in (("open_loop", first_token_plot), ("memory", memory_plot)):
        if name in figures:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{name}.svg").write_text(plot(figures[name]), encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description="Measure servers side by side.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that it runs, nothing more")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions that medians are taken of (3)")
    parser.add_argument("--threads", type=int, default=2, help="the threads that each contender computes with (2)")
    parser.add_argument("--offered", type=float, nargs="+", metavar="RATE", help="requests a second, of the open loop")
    parser.add_argument("--arrivals", type=int, default=24, help="at each of these rates (24)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the model's (float32)")
    parser.add_argument("--requests", type=int, default=32, help="of a closed loop's round (32)")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES, help="which to take (all)")
    parser.add_argument("--plot", type=Path, metavar="DIRECTORY", help="where to draw open_loop.svg and memory.svg")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
