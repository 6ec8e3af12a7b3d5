"""What a decode step costs as the rows, always as many, use more and more adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapters.factors import FactorStack
from benchmarks.decode_step import Rows, mixed, rotated
from benchmarks.floor import Floor
from benchmarks.sizes import ServingSizes
from benchmarks.stage import Stage, selections
from benchmarks.timing import Spent, median_ratio, median_wall, timed
from benchmarks.workload import random_prompt


def measure_step_growth(
    stage: Stage, sizes: ServingSizes, names: Sequence[str], floor: Floor, rounds: int
) -> dict[str, Any]:
    """Steps of all batches in turn, each at the same context; the median of their ratios to that of one adapter."""
    one, *more = counts = sizes.step_adapters
    rows = counts[-1]
    registry = stage.registry()
    factors = [registry.pin(selection.adapters[0].digest) for selection in selections(stage, names[:rows])]
    prompts = [random_prompt(sizes.decode_context, sizes.model.vocabulary, seed=row) for row in range(rows)]
    Rows(stage, prompts[:1], None)  # finds out which layers read the same input
    mixes = {k: mixed(factors[:k], rows, FactorStack(stage.base.adapted.siblings)) for k in counts}
    spent: dict[int, list[Spent]] = {k: [] for k in counts}
    for _ in range(rounds):
        batches = {k: Rows(stage, prompts, mix) for k, mix in mixes.items()}
        for turn in range(sizes.decode_steps):
            for k in rotated(counts, turn):
                spent[k].append(timed(batches[k].step)[1])
    return {
        "rows": rows,
        "context": [sizes.decode_context, sizes.decode_context + sizes.decode_steps],
        "factor_bytes": factors[0].nbytes,
        "step_ms": {str(k): 1000 * median_wall(took) for k, took in spent.items()},
        "floor_ms": {str(k): 1000 * floor.step_s(rows, k * factors[0].nbytes) for k in counts},
        "over_one": {str(k): median_ratio(spent[k], spent[one])["wall"] for k in more},
    }
