"""An engine whose decode steps are replayed, beside one whose steps are not: the same requests, the same tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.sizes import GraphSizes
from benchmarks.stage import Stage, add_adapters, open_stage, running_engine, selections
from benchmarks.workload import answer, greedy_request, random_prompt
from service.engine.graphs.capture import GraphBackend
from service.engine.graphs.setup import OFF, PAIRS, GraphOptions
from service.engine.model_runner import TransformersRunner
from service.engine.selection import SelectedAdapter, Selection
from service.engine.sequence import GenerationRequest

_MEMORY = 64 << 20  # of tables: more than the small model's adapters take


def check_tokens(
    sizes: GraphSizes, dtype: str, device: str, backend: Callable[[], GraphBackend] | None = None
) -> dict[str, Any]:
    """Both pairs under a flood of requests that join and leave: the base, adapters, and blends.

    `passed`: every answer is the eager engine's, in float32, and nothing was captured once the engine had started. In
    16 bits a step of another shape rounds otherwise, and random models magnify that: there `same` is only told.
    """
    figures: dict[str, Any] = {}
    with open_stage(sizes.checked_model, dtype=dtype, device=device, threads=1) as stage:
        names = list(add_adapters(stage, sizes.adapter, sizes.checked_adapters))
        requests = flood(stage, sizes, names)
        eager = _answers(stage, sizes, requests, GraphOptions(OFF), None)[0]
        for kernels in PAIRS:
            options = GraphOptions(kernels, _MEMORY, most=16)
            tokens, counted = _answers(stage, sizes, requests, options, backend() if backend else None)
            same = sum(tokens[name] == eager[name] for name in eager)
            passed = counted.get("captured_later") == 0 and counted["replayed"] > 0
            passed &= same == len(eager) or dtype != "float32"
            figures[kernels] = {**counted, "requests": len(eager), "same": same, "passed": passed}
    return figures


def flood(stage: Stage, sizes: GraphSizes, names: Sequence[str]) -> list[GenerationRequest]:
    """More requests than rows, of all lengths and selections."""
    draw, alone = random.Random(0), selections(stage, names)
    requests = []
    for i in range(sizes.checked_requests):
        first, second = (pair.adapters[0] for pair in draw.sample(alone, 2))
        blend = Selection((weighted(first, 0.6), weighted(second, draw.uniform(-0.5, 0.5))))
        chosen = draw.choice([Selection(), *draw.sample(alone, 2), blend])
        prompt = random_prompt(draw.randint(1, sizes.checked_model.context // 4), sizes.checked_model.vocabulary, i)
        requests.append(greedy_request(f"{i}", prompt, draw.randint(4, 48), chosen))
    return requests


def weighted(adapter: SelectedAdapter, weight: float) -> SelectedAdapter:
    return SelectedAdapter(adapter.name, adapter.digest, weight)


def _answers(
    stage: Stage,
    sizes: GraphSizes,
    requests: Sequence[GenerationRequest],
    options: GraphOptions,
    backend: GraphBackend | None,
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """The tokens by request, and what was captured, replayed and run eagerly."""
    registry = stage.registry()
    registry.check_stored()  # tables are made for what is there
    with running_engine(stage, registry, sizes.checked_rows, graphs=options, graph_backend=backend) as engine:
        runner = engine._worker._runner
        graphs = runner.graphs if isinstance(runner, TransformersRunner) else None
        captured = graphs.captures if graphs is not None else 0
        tokens = answer(engine, requests)
    if graphs is None:
        return tokens, {"replayed": 0}
    later = graphs.captures - captured
    counted = {"captured": captured, "captured_later": later, "replayed": graphs.replayed, "eager": dict(graphs.eager)}
    return tokens, counted
