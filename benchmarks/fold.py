"""When folding pays: what a fold and its restore cost, and what a folded step saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adapters.factors import FactorStack
from adapters.low_rank import LowRankBatch
from adapters.merge import Merger
from benchmarks.decode_step import Rows
from benchmarks.sizes import EngineSizes
from benchmarks.stage import Stage, selections
from benchmarks.timing import Spent, median_wall, timed
from benchmarks.workload import random_prompt


def measure_fold(stage: Stage, sizes: EngineSizes, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Steps of one selection in every row, beside the weights and folded into them, turn about.

    `break_even_steps` is how many folded steps pay for one fold and one restore.
    """
    factors = stage.registry().pin(selections(stage, names)[0].adapters[0].digest)
    merger = Merger(stage.base.adapted)
    merger.fold([(factors, 1.0)])  # copies the pristine weights aside, once
    merger.restore()
    figures: dict[str, Any] = {}
    for rows in (1, sizes.rows):
        prompts = [random_prompt(sizes.decode_context, sizes.model.vocabulary, seed=row) for row in range(rows)]
        folded = Rows(stage, prompts, None)  # first: it finds out which layers read the same input
        stack = FactorStack(stage.base.adapted.siblings)
        beside = Rows(stage, prompts, LowRankBatch([factors], torch.ones(1, 1), stack))
        spent: dict[str, list[Spent]] = {"beside": [], "folded": [], "fold": [], "restore": []}
        for _ in range(rounds):
            for _ in range(sizes.decode_steps // sizes.fold_steps):
                spent["beside"] += [timed(beside.step)[1] for _ in range(sizes.fold_steps)]
                spent["fold"].append(timed(lambda: merger.fold([(factors, 1.0)]))[1])
                spent["folded"] += [timed(folded.step)[1] for _ in range(sizes.fold_steps)]
                spent["restore"].append(timed(merger.restore)[1])
        took = {name: 1000 * median_wall(each) for name, each in spent.items()}
        saved = took["beside"] - took["folded"]
        figures[f"rows_{rows}"] = {
            "step_beside_ms": took["beside"],
            "step_folded_ms": took["folded"],
            "fold_ms": took["fold"],
            "restore_ms": took["restore"],
            "break_even_steps": (took["fold"] + took["restore"]) / saved if saved > 0 else None,
        }
    return figures
