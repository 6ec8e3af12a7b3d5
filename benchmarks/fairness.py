"""How long a lone request waits behind a flood for another adapter: its first token, over that on an idle engine."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.cold_adapter import first_token
from benchmarks.sizes import EngineSizes
from benchmarks.stage import Stage, running_engine, selections
from benchmarks.workload import Recorder, greedy_request, random_prompt


def measure_fairness(stage: Stage, sizes: EngineSizes, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Lone requests one after another, first with nothing else to do, then behind the flood, which never runs dry."""
    flooding, lone = selections(stage, names)[:2]
    registry = stage.registry()
    idle: list[float] = []
    flooded: list[float] = []
    for turn in range(rounds):
        with running_engine(stage, registry, sizes.rows, max_queue=sizes.flood + 1) as engine:
            first_token(engine, sizes, lone)  # its adapter is loaded then
            idle += [first_token(engine, sizes, lone).seconds for _ in range(sizes.lone_requests)]
            recorder = Recorder()
            flood = []
            for i in range(sizes.flood):
                name = f"flood-{turn}-{i}"
                prompt = random_prompt(sizes.probe_prompt, sizes.model.vocabulary, seed=name)
                flood.append(greedy_request(name, prompt, sizes.flood_output, flooding))
                engine.submit([flood[-1]], recorder)
            recorder.wait_for_tokens(flood[: sizes.rows], 1)
            for _ in range(sizes.lone_requests):
                flooded.append(first_token(engine, sizes, lone).seconds)
            deep = engine.stats().waiting
            for request in flood:
                engine.cancel(request.request_id)
            recorder.wait_for_end(flood)
    return {
        "flood": sizes.flood,
        "still_waiting": deep,
        "rows": sizes.rows,
        "idle_ms": 1000 * median(idle),
        "flooded_ms": 1000 * median(flooded),
        "flooded_worst_ms": 1000 * max(flooded),
        "flooded_over_idle": median(flooded) / median(idle),
    }
