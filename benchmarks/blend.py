"""Weighted sums of adapters: ours, per request and stored, against two common ways of adding LoRA factors.

    python -m benchmarks.blend [--quick]

Every way gets the same factors, of 2 and of 4 adapters. Its error is that of the layers' deltas against `Σ w · B @ A`
in float64, relative to it. `weighted_factors` adds A's and B's separately, each by its weight, as LoRAX's linear merge
does; PEFT's `add_weighted_adapter` does so by the weights' roots (`linear`), or stacks them (`cat`). Needs PEFT. Ends
in one line of JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters.blend import blend
from adapters.checkpoint import TopKCheckpoint
from adapters.factors import AdapterFactors, FactorStack
from adapters.low_rank import LowRankBatch
from benchmarks.report import report_line
from benchmarks.sizes import QUICK_ENGINE, AdapterShape, EngineSizes
from benchmarks.stage import Stage, add_adapters, open_stage, selections
from benchmarks.timing import Spent, median_wall, timed
from service.engine.threads import in_own_thread

WEIGHTS: Mapping[int, Sequence[float]] = {2: (0.7, 0.3), 4: (0.4, 0.3, 0.2, 0.1)}

Deltas = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Members:
    """The adapters of one blend: as they are stored, as they run, and what their sum is in float64."""

    stored: Sequence[TopKCheckpoint]
    factors: Sequence[AdapterFactors]
    weights: Sequence[float]
    expected: Deltas


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    sizes = QUICK_ENGINE if options.quick else EngineSizes()
    rounds = 1 if options.quick else options.rounds
    with open_stage(sizes.model, dtype="float32", device="cpu", threads=options.threads) as stage:
        names = list(add_adapters(stage, sizes.adapter, max(WEIGHTS)))
        measure = partial(measure_blends, stage, names, sizes.adapter, rounds)
        figures = in_own_thread(stage.threads, measure)
    print(report_line("blend", sizes, figures, (), options.threads))


def measure_blends(stage: Stage, names: Sequence[str], shape: AdapterShape, rounds: int) -> dict[str, Any]:
    registry = stage.registry()
    digests = [selection.adapters[0].digest for selection in selections(stage, names)]
    factors = [registry.pin(digest) for digest in digests]
    stored = [registry.compact(digest) for digest in digests]
    peft = _peft_with(stage, factors, shape)
    figures: dict[str, Any] = {}
    for count, weights in WEIGHTS.items():
        members = Members(stored[:count], factors[:count], weights, _expected(factors[:count], weights))
        figures[f"adapters_{count}"] = {
            name: _measured(way, members, rounds)
            for name, way in {
                "per_request": partial(_per_request, stage),
                "stored": _stored,
                "weighted_factors": _weighted_factors,
                "peft_linear": partial(_peft, peft, "linear"),
                "peft_cat": partial(_peft, peft, "cat"),
            }.items()
        }
    return figures


def _measured(way: Callable[[Members], Callable[[], Deltas]], members: Members, rounds: int) -> dict[str, float]:
    """`ms` to have the blend ready to run; `relative_error` ‖got − sum‖ / ‖sum‖ of the worst layer."""
    spent: list[Spent] = []
    for _ in range(rounds):
        read, took = timed(lambda: way(members))
        spent.append(took)
    errors = [
        float((got.double() - members.expected[name]).norm() / members.expected[name].norm())
        for name, got in read().items()
    ]
    return {"ms": 1000 * median_wall(spent), "relative_error": max(errors)}


def _expected(factors: Sequence[AdapterFactors], weights: Sequence[float]) -> dict[str, Tensor]:
    return {
        name: sum(
            (w * each.layers[name].b_t.double().T @ each.layers[name].a.double())
            for each, w in zip(factors, weights, strict=True)
        )
        for name in factors[0].layers
    }  # type: ignore[return-value]


def _per_request(stage: Stage, members: Members) -> Callable[[], Deltas]:
    """The batch of one row with this selection. Its deltas are read by running unit vectors through each layer."""
    stack = FactorStack(stage.base.adapted.siblings)
    batch = LowRankBatch(members.factors, torch.tensor([members.weights]), stack)

    def read() -> Deltas:
        deltas = {}
        for name, layer in members.factors[0].layers.items():
            unit = torch.eye(layer.a.shape[1]).unsqueeze(0)  # one row whose tokens are the unit vectors
            output = torch.zeros(1, layer.a.shape[1], layer.b_t.shape[1])
            batch.add_delta(name, output, unit)
            batch.forget_input()
            deltas[name] = output[0].T
        return deltas

    return read


def _stored(members: Members) -> Callable[[], Deltas]:
    blended = blend(list(zip(members.stored, members.weights, strict=True)))
    return lambda: {layer.name: b_t.T @ a for layer, a, b_t in blended.factors()}


def _weighted_factors(members: Members) -> Callable[[], Deltas]:
    summed: dict[str, tuple[Tensor, Tensor]] = {}
    for name in members.factors[0].layers:
        pairs = [each.layers[name] for each in members.factors]
        a = torch.stack([w * pair.a for w, pair in zip(members.weights, pairs, strict=True)]).sum(0)
        b_t = torch.stack([w * pair.b_t for w, pair in zip(members.weights, pairs, strict=True)]).sum(0)
        summed[name] = a, b_t
    return lambda: {name: b_t.T @ a for name, (a, b_t) in summed.items()}


def _peft_with(stage: Stage, factors: Sequence[AdapterFactors], shape: AdapterShape) -> PeftModel:
    """The base with each adapter's factors as a plain LoRA, which they equal."""
    model = AutoModelForCausalLM.from_pretrained(stage.base_directory, dtype=torch.float32)
    config = LoraConfig(r=shape.r, lora_alpha=shape.r, target_modules=list(shape.targets), task_type="CAUSAL_LM")
    peft = get_peft_model(model, config, adapter_name="0")
    for i in range(1, len(factors)):
        peft.add_adapter(str(i), config)
    for i, adapter in enumerate(factors):
        for name, layer in adapter.layers.items():
            module: Any = peft.base_model.model.get_submodule(name)
            module.lora_A[str(i)].weight.data = layer.a.clone()
            module.lora_B[str(i)].weight.data = layer.b_t.T.contiguous()
    return peft


def _peft(peft: PeftModel, kind: str, members: Members) -> Callable[[], Deltas]:
    if "blend" in peft.peft_config:
        peft.delete_adapter("blend")
    names = [str(i) for i in range(len(members.weights))]
    peft.base_model.add_weighted_adapter(names, list(members.weights), "blend", combination_type=kind)
    modules = {name: peft.base_model.model.get_submodule(name) for name in members.factors[0].layers}
    return lambda: {name: module.get_delta_weight("blend").detach() for name, module in modules.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blend", description="Measure blends.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that it runs, nothing more")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions that medians are taken of (7)")
    parser.add_argument("--threads", type=int, default=2, help="the threads that each way computes with (2)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
