"""The memory of a server's process against the number of adapters that it serves. Linux only: it reads /proc."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from adapters.checkpoint import TopKCheckpoint
from adapters.export import write_adapter
from adapters.safetensors_header import WEIGHTS_FILE
from benchmarks.contenders.process import Contender
from benchmarks.load.streams import Endpoint, closed_loop
from benchmarks.residency import variant
from benchmarks.sizes import ServingSizes
from benchmarks.stage import Stage, random_adapter
from benchmarks.workload import greedy_request, random_prompt
from service.engine.selection import SelectedAdapter, Selection
from tests.server import Server


def measure_memory(stage: Stage, sizes: ServingSizes) -> dict[str, Any]:
    """Each process answers one request before it is looked at. The floor is the weights and the adapters' files."""
    template = random_adapter(stage.base, sizes.adapter, seed=0)
    folder = stage.root / "memory"
    server, file_bytes = _of_server(stage, sizes, template, folder)
    peft = {str(count): _of_peft(stage, sizes, template, folder, count) for count in sizes.peft_memory_adapters}
    weights = stage.base.parameters * stage.base.dtype.itemsize
    first, last = str(sizes.memory_adapters[0]), str(sizes.memory_adapters[-1])
    return {
        "file_bytes": file_bytes,
        "server_bytes": server,
        "server_bytes_per_adapter": (server[last] - server[first]) / (int(last) - int(first)),
        "peft_bytes": peft,
        "floor_bytes": {str(count): weights + count * file_bytes for count in sizes.memory_adapters},
    }


def _of_server(stage: Stage, sizes: ServingSizes, template: TopKCheckpoint, folder: Path) -> tuple[dict[str, int], int]:
    """One server to which adapters are uploaded; its memory at each number of them, and the bytes of one's file."""
    resident: dict[str, int] = {}
    arguments = ("--model", str(stage.base_directory), "--threads", f"{stage.threads}")
    with Server("serve", *arguments, data_dir=stage.root / "memory-data") as server:
        uploaded = 0
        for count in sizes.memory_adapters:
            for n in range(uploaded, count):
                directory = _written(template, folder, n)
                server.upload(f"adapter-{n}", directory).raise_for_status()
                file_bytes = (directory / WEIGHTS_FILE).stat().st_size
                shutil.rmtree(directory)
            uploaded = count
            _ask_one(sizes, server.port, count)
            resident[str(count)] = resident_bytes(server.process.pid)
    return resident, file_bytes


def _of_peft(stage: Stage, sizes: ServingSizes, template: TopKCheckpoint, folder: Path, count: int) -> int:
    given = [f"--adapter=adapter-{n}={_written(template, folder, n)}" for n in range(count)]
    with Contender("peft_app", "--base", str(stage.base_directory), *given, f"--threads={stage.threads}") as app:
        app.wait()
        _ask_one(sizes, app.port, count)
        return resident_bytes(app.process.pid)


def _written(template: TopKCheckpoint, folder: Path, n: int) -> Path:
    directory = folder / f"{n}"
    if not directory.exists():
        write_adapter(variant(template, n), directory)
    return directory


def _ask_one(sizes: ServingSizes, port: int, count: int) -> None:
    """The adapter that came last answers."""
    prompt = random_prompt(sizes.prompt[0], sizes.model.vocabulary, seed=count)
    selection = Selection((SelectedAdapter(f"adapter-{count - 1}", ""),))
    closed_loop(Endpoint(port).ask, [greedy_request("memory", prompt, sizes.output[0], selection)], clients=1)


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
