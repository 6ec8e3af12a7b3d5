"""Memory per registered adapter, held against the size of its file.

    python -m benchmarks.residency [--quick] [--adapters N]

Linux only: it reads /proc. Takes about 6 GB of memory and of disk. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.checkpoint import TopKCheckpoint
from adapters.export import write_adapter
from adapters.registry import AdapterRegistry
from adapters.safetensors_header import WEIGHTS_FILE
from adapters.vector_bank import VectorBank
from benchmarks.report import Target, report_line
from benchmarks.sizes import QUICK_RESIDENCY, ResidencySizes
from benchmarks.stage import Stage, open_stage, random_adapter, register, running_engine, selections
from benchmarks.workload import answer, greedy_request, on_base, random_prompt

TARGETS = (Target("memory_over_file", at_most=1.1),)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    sizes = QUICK_RESIDENCY if options.quick else ResidencySizes()
    with open_stage(sizes.model, dtype="bfloat16", device="cpu", threads=options.threads) as stage:
        figures = measure_residency(stage, sizes, 20 if options.quick else options.adapters)
    print(report_line("residency", sizes, figures, () if options.quick else TARGETS, options.threads))


def measure_residency(stage: Stage, sizes: ResidencySizes, count: int) -> dict[str, Any]:
    """How much the process grows by while it registers adapters, all of which it then can serve, some at once."""
    template = random_adapter(stage.base, sizes.adapter, seed=0)
    registry = stage.registry()
    names = [f"adapter-{i}" for i in range(count)]
    _register(stage, registry, "first", template)  # what the first one allocates serves them all
    answer_all(stage, registry, sizes, ["first"])
    before = resident_bytes()
    start = time.perf_counter()
    files = [_register(stage, registry, name, variant(template, i + 1)) for i, name in enumerate(names)]
    seconds = time.perf_counter() - start
    grown = resident_bytes() - before
    chosen = random.Random(0).sample(names, sizes.answering)
    unlike_base = answer_all(stage, registry, sizes, chosen)
    return {
        "adapters": count,
        "file_bytes": sum(files) / count,
        "memory_bytes": grown / count,
        "memory_over_file": grown / sum(files),
        "register_ms": 1000 * seconds / count,
        "answered_at_once": len(chosen),
        "answers_unlike_base": unlike_base,
        "answering_grew_bytes": resident_bytes() - before - grown,
    }


def variant(template: TopKCheckpoint, n: int) -> TopKCheckpoint:
    """Another adapter of the same shape: every tensor differs."""
    return replace(
        template,
        bank=VectorBank(template.bank.vectors.roll(n)),
        indices=template.indices.roll(n, dims=0),
        weights=template.weights.roll(n, dims=0),
    )


def _register(stage: Stage, registry: AdapterRegistry, name: str, checkpoint: TopKCheckpoint) -> int:
    """The bytes of the adapter's weights file."""
    directory = stage.root / "new"
    write_adapter(checkpoint, directory)
    register(stage.store, registry, name, directory)
    size = (directory / WEIGHTS_FILE).stat().st_size
    shutil.rmtree(directory)
    return size


def answer_all(stage: Stage, registry: AdapterRegistry, sizes: ResidencySizes, names: Sequence[str]) -> int:
    """One request for each adapter, all at once, after one for the base; how many answers differ from the base's."""
    prompt = random_prompt(sizes.prompt, sizes.model.vocabulary, seed=0)
    requests = [
        greedy_request(name, prompt, sizes.output, selection)
        for name, selection in zip(names, selections(stage, names), strict=True)
    ]
    with running_engine(stage, registry, len(names)) as engine:
        (base,) = answer(engine, on_base(requests[:1])).values()
        return sum(tokens != base for tokens in answer(engine, requests).values())


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residency", description="Measure adapters' memory.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, nothing more")
    parser.add_argument("--adapters", type=int, default=2000, help="how many to register (2000)")
    parser.add_argument("--threads", type=int, default=2, help="the threads that the engine computes with (2)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
