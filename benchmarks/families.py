"""Adapters per GB on the disk and in memory: each on a bank of its own, and all on one that they share.

    python -m benchmarks.families [--quick] [--adapters N]

Linux only: it reads /proc. Takes about 6 GB of memory and of disk. Ends in one line of JSON. A GB is 10^9 bytes.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.checkpoint import TopKCheckpoint
from adapters.export import write_adapter
from adapters.registry import AdapterRegistry
from adapters.safetensors_header import WEIGHTS_FILE
from benchmarks.report import report_line
from benchmarks.residency import answer_all, resident_bytes, variant
from benchmarks.sizes import QUICK_RESIDENCY, ResidencySizes
from benchmarks.stage import Stage, open_stage, random_adapter, register

GB = 1e9


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    sizes = QUICK_RESIDENCY if options.quick else ResidencySizes()
    with open_stage(sizes.model, dtype="bfloat16", device="cpu", threads=options.threads) as stage:
        figures = measure_families(stage, sizes, 20 if options.quick else options.adapters)
    print(report_line("families", sizes, figures, (), options.threads))


def measure_families(stage: Stage, sizes: ResidencySizes, count: int) -> dict[str, Any]:
    """What `count` adapters with private banks take, then as many that share one; then some of these answer at once."""
    template = random_adapter(stage.base, sizes.adapter, seed=0)
    registry = stage.registry()
    _register(stage, registry, _written(stage, "first", template))  # what the first one allocates serves them all
    answer_all(stage, registry, sizes, ["first"])
    first = variant(template, count + 1)  # the bank of the family, which nobody has yet
    private = _measure(stage, registry, "private", count, lambda n: variant(template, n + 1))
    shared = _measure(stage, registry, "shared", count, lambda n: replace(variant(first, n), bank=first.bank))
    chosen = random.Random(0).sample([f"shared-{n}" for n in range(count)], sizes.answering)
    return {
        "adapters": 2 * count,
        "bank_bytes": template.bank.vectors.nbytes,
        "private": private,
        "shared": shared,
        "shared_over_private": {
            key: shared[key] / private[key]
            for key in private
            if key.startswith("adapters_per_gb") and shared[key] and private[key]
        },
        "answered_at_once": len(chosen),
        "answers_unlike_base": answer_all(stage, registry, sizes, chosen),
    }


def _measure(
    stage: Stage, registry: AdapterRegistry, kind: str, count: int, adapter: Callable[[int], TopKCheckpoint]
) -> dict[str, Any]:
    """Growth per adapter while they are registered. `disk` is of the adapters' files and banks."""
    directories = [_written(stage, f"{kind}-{n}", adapter(n)) for n in range(count)]
    files = sum((directory / WEIGHTS_FILE).stat().st_size for directory in directories)
    memory, (held, allocated) = resident_bytes(), disk_usage(stage.root / "data")
    start = time.perf_counter()
    for directory in directories:
        _register(stage, registry, directory)
    seconds = time.perf_counter() - start
    memory_grown = (resident_bytes() - memory) / count
    held_now, allocated_now = disk_usage(stage.root / "data")
    held_grown, allocated_grown = (held_now - held) / count, (allocated_now - allocated) / count
    return {
        "file_bytes": files / count,
        "disk_bytes": held_grown,
        "disk_allocated": allocated_grown,
        "memory_bytes": memory_grown,
        "register_ms": 1000 * seconds / count,
        "adapters_per_gb_of_disk": GB / held_grown,
        "adapters_per_gb_of_disk_allocated": GB / allocated_grown,
        "adapters_per_gb_of_memory": GB / memory_grown if memory_grown > 0 else None,  # a few fit into what was there
    }


def _written(stage: Stage, name: str, checkpoint: TopKCheckpoint) -> Path:
    """A PEFT directory. Written before anything is measured: making adapters is not a server's work."""
    directory = stage.root / "uploads" / name
    write_adapter(checkpoint, directory)
    return directory


def _register(stage: Stage, registry: AdapterRegistry, directory: Path) -> None:
    register(stage.store, registry, directory.name, directory)


def disk_usage(data_dir: Path) -> tuple[int, int]:
    """(bytes, bytes of allocated blocks) of the adapters' files, banks and directories, each inode once, as du does."""
    inodes = {
        (status.st_dev, status.st_ino): (0 if path.is_dir() else status.st_size, 512 * status.st_blocks)
        for path in _paths(data_dir)
        for status in (path.lstat(),)
    }
    held, allocated = zip(*inodes.values(), strict=True)
    return sum(held), sum(allocated)


def _paths(data_dir: Path) -> Iterator[Path]:
    for part in ("blobs", "banks"):
        for folder, _, files in os.walk(data_dir / part):
            yield Path(folder)
            yield from (Path(folder, name) for name in files)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description="Measure adapters per GB.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, nothing more")
    parser.add_argument("--adapters", type=int, default=500, help="how many of each kind to register (500)")
    parser.add_argument("--threads", type=int, default=2, help="the threads that the engine computes with (2)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
