"""What adapters add to a decode step: batches with 1 to K distinct adapters beside the same rows on the base alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from adapters.factors import AdapterFactors, FactorStack
from adapters.low_rank import LowRankBatch
from benchmarks.sizes import EngineSizes
from benchmarks.stage import Stage, selections
from benchmarks.timing import Spent, median_ratio, median_wall, timed
from benchmarks.workload import random_prompt
from service.engine.build import EngineOptions
from service.engine.self_test import choose_runner

BASE = "base"
T = TypeVar("T")


class Rows:
    """A batch of rows of equal length in a runner of its own, all decoding with one low-rank part.

    All that this benchmark asks of a runner is here.
    """

    def __init__(self, stage: Stage, prompts: Sequence[Sequence[int]], batch: LowRankBatch | None) -> None:
        base = stage.base
        self._runner, _ = choose_runner(
            base.adapted, base.device, base.vocabulary, EngineOptions().kv_memory, base.context
        )
        self._batch = batch
        self._rows = range(len(prompts))
        self._tokens = [[prompt[-1]] for prompt in prompts]
        self._runner.add(len(prompts))
        self._runner.extend(self._rows, prompts, batch)

    def step(self) -> None:
        """One more token of every row, its token logits on the CPU."""
        self._runner.extend(self._rows, self._tokens, self._batch)


def measure_decode_step(stage: Stage, sizes: EngineSizes, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Steps of all batches in turn, each at the same context; the median of their ratios to the base's step."""
    registry = stage.registry()
    factors = [registry.pin(selection.adapters[0].digest) for selection in selections(stage, names)]
    prompts = [random_prompt(sizes.decode_context, sizes.model.vocabulary, seed=row) for row in range(sizes.rows)]
    Rows(stage, prompts[:1], None)  # finds out which layers read the same input
    stacks = {k: FactorStack(stage.base.adapted.siblings) for k in distinct_counts(sizes)}
    mixes = {str(k): mixed(factors[:k], sizes.rows, stack) for k, stack in stacks.items()}
    spent: dict[str, list[Spent]] = {name: [] for name in (BASE, *mixes)}
    for _ in range(rounds):
        batches = {BASE: Rows(stage, prompts, None)}
        batches.update((name, Rows(stage, prompts, batch)) for name, batch in mixes.items())
        for turn in range(sizes.decode_steps):
            for name in rotated(list(batches), turn):
                spent[name].append(timed(batches[name].step)[1])
    base = spent.pop(BASE)
    return {
        "rows": sizes.rows,
        "context": [sizes.decode_context, sizes.decode_context + sizes.decode_steps],
        "base_ms": 1000 * median_wall(base),
        "with_adapters_ms": {name: 1000 * median_wall(took) for name, took in spent.items()},
        "over_base": {name: median_ratio(took, base) for name, took in spent.items()},
    }


def distinct_counts(sizes: EngineSizes) -> list[int]:
    """1, 4 and as many adapters as rows."""
    return [1, 4, sizes.rows] if sizes.rows > 4 else [1, sizes.rows]


def mixed(factors: Sequence[AdapterFactors], rows: int, stack: FactorStack) -> LowRankBatch:
    """Row i runs adapter i, counted round."""
    weights = torch.zeros(rows, len(factors))
    weights[torch.arange(rows), torch.arange(rows) % len(factors)] = 1.0
    return LowRankBatch(list(factors), weights, stack)


def rotated(names: Sequence[T], turn: int) -> list[T]:
    """Everyone goes first equally often: whoever follows a larger batch finds colder caches."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]
