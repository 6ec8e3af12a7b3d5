"""Tokens per second of the engine beside PEFT's, on the same requests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.peft_baseline import PeftBaseline
from benchmarks.sizes import EngineSizes
from benchmarks.stage import Stage, running_engine, selections
from benchmarks.timing import Spent, median_ratio, median_wall, timed
from benchmarks.workload import answer, make_requests, on_base, output_tokens
from service.engine.seam import Engine
from service.engine.sequence import GenerationRequest


def measure_throughput(
    stage: Stage, sizes: EngineSizes, adapters: Mapping[str, Path], *, max_batch_size: int, rounds: int
) -> dict[str, Any]:
    """Every contender answers all requests once per round, in turn; the median round and the median ratio count.

    Each is warm: the engine, which is started for its turn, has answered as many requests before.
    """
    used = dict(list(adapters.items())[: sizes.request_adapters])
    chosen = selections(stage, list(used))
    peft = PeftBaseline(stage.base_directory, used, stage.base.device, stage.threads)
    spent: dict[str, list[Spent]] = defaultdict(list)
    answered_as_peft = []
    registry = stage.registry()
    for turn in range(1, rounds + 1):
        requests = make_requests(sizes, chosen, turn)
        with running_engine(stage, registry, max_batch_size) as engine:  # its workers end with it, as PEFT's do
            check_answers(engine, peft, make_requests(sizes, chosen)[: sizes.checked_requests])
            answer(engine, make_requests(sizes, chosen, -turn))  # a server that has been running: its memory is touched
            ours, took = timed(partial(answer, engine, requests))
        spent["engine"].append(took)
        theirs, took = timed(partial(peft.one_by_one, requests))
        spent["peft_one_by_one"].append(took)
        _, took = timed(partial(peft.by_adapter, requests, sizes.peft_batch))
        spent["peft_by_adapter"].append(took)
        answered_as_peft.append(sum(ours[name] == tokens for name, tokens in theirs.items()) / len(requests))
    tokens = output_tokens(requests)
    return {
        "output_tokens": tokens,
        "prompt_tokens": sum(len(request.prompt_ids) for request in requests),
        "max_batch_size": max_batch_size,
        "tokens_per_s": {name: tokens / median_wall(took) for name, took in spent.items()},
        "cpu_s": {name: median(one.cpu for one in took) for name, took in spent.items()},
        "over_peft_one_by_one": median_ratio(spent["peft_one_by_one"], spent["engine"]),
        "over_peft_by_adapter": median_ratio(spent["peft_by_adapter"], spent["engine"]),
        "answered_as_peft": fmean(answered_as_peft),
    }


def check_answers(engine: Engine, peft: PeftBaseline, requests: Sequence[GenerationRequest]) -> None:
    """Speed counts only for the right tokens: PEFT's, which are not the base model's. Warms both up, too."""
    ours = answer(engine, requests)
    if ours != peft.one_by_one(requests):
        raise RuntimeError("the engine and PEFT answer differently; nothing was measured")
    if ours == answer(engine, on_base(requests)):
        raise RuntimeError("the adapters change nothing; nothing was measured")
