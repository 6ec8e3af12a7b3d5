"""Decode steps of a 7B Llama with random weights, replayed: the base alone, and with adapters by either pair.

Adapters are taken straight into the tables: no factors are composed for those that are only timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from adapters.binding import BaseIdentity
from adapters.checkpoint import TopKCheckpoint
from adapters.factors import AdapterFactors, LayerFactors
from adapters.kernels.choice import faster_pair
from adapters.kernels.delta import Pair
from adapters.kernels.model_tables import SelectionTables, TableSpec
from adapters.kernels.residency import SlotResidency
from adapters.kernels.table_batch import TableBatch
from adapters.kernels.tables import RowTable
from adapters.layers import AdaptedModel
from adapters.vector_bank import VectorBank
from benchmarks.kernel_bytes import BANDWIDTHS
from benchmarks.sizes import GraphSizes, ModelShape
from benchmarks.stage import llama_config, random_adapter, word_tokenizer
from service.engine.base_model import DTYPES, LoadedBase, modules_of
from service.engine.graphs.buckets import Bucket, Buckets
from service.engine.graphs.capture import GraphBackend
from service.engine.graphs.decode import DecodeGraphs
from service.engine.graphs.setup import PAIRS, GraphOptions, groups_of, prepared, table_spec
from service.engine.graphs.static_step import StaticStep, StepBuffers
from service.engine.kv.slots import SlotBackend
from service.engine.self_test import choose_runner
from service.engine.tokenizer import TextTokenizer


@dataclass(frozen=True, eq=False)
class Mix:
    """What a replayed step needs of a LowRankBatch: that one would stack the adapters' factors."""

    adapters: Sequence[AdapterFactors]
    weights: Tensor


def random_base(shape: ModelShape, dtype: str, device: torch.device) -> LoadedBase:
    """A Llama whose weights are drawn on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(llama_config(shape, dtype), dtype=DTYPES[dtype])
    model = model.eval().requires_grad_(False)
    adapted = AdaptedModel(model, modules_of(model, model.config))
    return LoadedBase(
        id="random",
        model_type="llama",
        adapted=adapted,
        tokenizer=TextTokenizer(word_tokenizer(shape.vocabulary), shape.vocabulary),
        identity=BaseIdentity(frozenset({"random"})),
        device=device,
        dtype=DTYPES[dtype],
        context=shape.context,
        vocabulary=shape.vocabulary,
        eos_token_ids=frozenset(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        quantization=None,
        fingerprint="",
        created=0,
    )


class Steps:
    """Rows of one length, whose next token is run again and again: the last one is forgotten each time."""

    def __init__(self, base: LoadedBase, sizes: GraphSizes, backend: GraphBackend, rounds: int) -> None:
        self._base = base
        self._sizes = sizes
        self._backend = backend
        self._rounds = rounds
        self.runner, _ = choose_runner(base.adapted, base.device, base.vocabulary, sizes.kv_memory, base.context)
        assert isinstance(self.runner.kv, SlotBackend)
        self.kv = self.runner.kv
        self.kv.reserve(max(sizes.rows), 2 * sizes.context)

    def measure(self) -> dict[str, Any]:
        """By number of rows: the base's own step, and those with every row on an adapter of its own."""
        self.template = random_adapter(self._base, self._sizes.adapter, seed=0)
        figures: dict[str, Any] = {}
        base = self._without_adapters()
        by_kernels = {name: self._with(name) for name in PAIRS}
        for rows in self._sizes.rows:
            self._begin(rows)
            mix = self.mix(range(rows))
            took = {"base": self._timed(base, rows, None)}
            took |= {name: self._timed(graphs, rows, mix) for name, graphs in by_kernels.items()}
            took |= {f"{name}_base_rows": self._timed(graphs, rows, None) for name, graphs in by_kernels.items()}
            floor = self._floor(rows)
            figures[f"rows_{rows}"] = {
                **{f"{name}_us": 1e6 * device for name, (device, _) in took.items()},
                **{f"{name}_wall_us": 1e6 * wall for name, (_, wall) in took.items()},
                **{f"{name}_over_base": took[name][0] / took["base"][0] for name in took if name != "base"},
                "launches": {
                    name: self._launches(graphs, rows) for name, graphs in {"base": base, **by_kernels}.items()
                },
                "base_floor_us": None if floor is None else 1e6 * floor,
                "base_share_of_floor": None if floor is None else floor / took["base"][0],
            }
            self.runner.keep([])
        return figures

    def faster_pair(self) -> Pair:
        """What `auto` takes here."""
        spec = self._spec()
        groups = groups_of(self._base, spec)
        return faster_pair(groups, spec, max(self._sizes.rows), self._base.device, self._backend)

    def resident(self) -> dict[str, Any]:
        """So many adapters in the tables at once, each with a bank of its own; steps that mix some of all."""
        spec, count = self._spec(), self._sizes.resident
        groups = groups_of(self._base, spec)
        size = SelectionTables.slot_bytes(groups, spec)
        _, graphs = self._graphs("bank-direct", memory=count * size)
        began = time.perf_counter()
        for n in range(count):
            assert graphs.residency.hold([self.adapter(n)]) is not None
        self._wait()
        filled = time.perf_counter() - began
        rows = max(self._sizes.rows)
        self._begin(rows)
        spread = self.mix([n * (count // rows) for n in range(rows)])
        device, wall = self._timed(graphs, rows, spread)
        self.runner.keep([])
        return {
            "adapters": graphs.residency.resident,
            "slot_bytes": size,
            "fill_ms": 1000 * filled / count,
            "rows": rows,
            "step_us": 1e6 * device,
            "step_wall_us": 1e6 * wall,
            "evicted": graphs.residency.evicted,
        }

    def cold(self) -> dict[str, float]:
        """From a compact adapter in the host's memory to one that prompts and replayed steps can run with."""
        spec = self._spec()
        groups = groups_of(self._base, spec)
        tables = SelectionTables(groups, spec, self._sizes.cold, self._base.device)
        residency, composed, filled = SlotResidency(tables), [], []
        for n in range(self._sizes.cold):
            checkpoint = variant(self.template, n)
            self._wait()
            began = time.perf_counter()
            layers = {layer.name: LayerFactors(a, b_t) for layer, a, b_t in checkpoint.factors(self._base.device)}
            self._wait()
            between = time.perf_counter()
            residency.hold([AdapterFactors(f"cold {n}", layers, selections=checkpoint)])
            self._wait()
            composed.append(between - began)
            filled.append(time.perf_counter() - between)
        return {"compose_ms": 1000 * median(composed), "fill_slot_ms": 1000 * median(filled)}

    # --- adapters and graphs ----------------------------------------------------------------------

    def adapter(self, n: int) -> AdapterFactors:
        """Number n: compact, without factors."""
        checkpoint = variant(self.template, n)
        return AdapterFactors(f"{n}", dict.fromkeys(checkpoint_names(checkpoint), _NO_FACTORS), selections=checkpoint)

    def mix(self, numbers: Sequence[int]) -> Mix:
        return Mix([self.adapter(n) for n in numbers], torch.eye(len(numbers)))

    def _spec(self) -> TableSpec:
        return table_spec([self.template.layout], self._base.modules.layers, self._base.dtype)

    def _with(self, kernels: str) -> DecodeGraphs:
        _, graphs = self._graphs(kernels, memory=max(self._sizes.rows) * self._factor_bytes())
        if PAIRS[kernels] is PAIRS["gathered"]:  # factors are needed once, to fill the slots
            for n in range(max(self._sizes.rows)):
                checkpoint = variant(self.template, n)
                layers = {layer.name: LayerFactors(a, b_t) for layer, a, b_t in checkpoint.factors(self._base.device)}
                assert graphs.residency.hold([AdapterFactors(f"{n}", layers)]) is not None
        return graphs

    def _factor_bytes(self) -> int:
        return 4 * self.template.layout.parameters().lora_params  # no slot of either kind takes more

    def _graphs(self, kernels: str, memory: int) -> tuple[Any, DecodeGraphs]:
        options = GraphOptions(kernels, memory)
        return prepared(self._base, self.runner, self.kv, [self.template.layout], options, self._backend)

    def _without_adapters(self) -> DecodeGraphs:
        """The base's own step: no layer has a low-rank part."""
        base, rows, device = self._base, self.kv.slots, self._base.device
        buffers, nobody = StepBuffers(rows, base.vocabulary, device), RowTable(rows, device=device)
        step = StaticStep(
            base.adapted,
            self.kv,
            buffers,
            TableBatch([], []),
            takes_positions=self.runner.takes_positions,
            keeps_last_logits=self.runner.keeps_last_logits,
        )
        none = SlotResidency(SelectionTables([], self._spec(), 1, device))
        buckets = Buckets.of(rows, self.kv.columns, most=64)
        return DecodeGraphs(base.adapted, self.kv, step, buffers, nobody, none, buckets, self._backend)

    # --- time -------------------------------------------------------------------------------------

    def _begin(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.runner.add(rows)
        for row in range(rows):
            prompt = torch.randint(self._base.vocabulary, (self._sizes.context,), generator=generator).tolist()
            self.runner.extend([row], [prompt], None)

    def _timed(self, graphs: DecodeGraphs, rows: int, mix: Mix | None) -> tuple[float, float]:
        """Seconds of a step: on the device alone, and from the tokens to their logits on the host; medians."""
        tokens, wall = [[row] for row in range(rows)], []
        for _ in range(self._rounds + 1):  # the first captures
            self.kv._lengths = [self._sizes.context] * rows
            began = time.perf_counter()
            with torch.inference_mode():
                answer = graphs.run(range(rows), tokens, mix)  # type: ignore[arg-type]
            wall.append(time.perf_counter() - began)
            if answer is None:
                raise RuntimeError(f"the step was not replayed: {dict(graphs.eager)}")
        replay = graphs._replay(self._bucket(graphs, rows))
        device = [self._backend.seconds(replay) for _ in range(self._rounds)]
        return median(device), median(wall[1:])

    def _bucket(self, graphs: DecodeGraphs, rows: int) -> Bucket:
        bucket = graphs._bucket(self._sizes.context + 1, rows)
        assert bucket is not None
        return bucket

    def _launches(self, graphs: DecodeGraphs, rows: int) -> int | None:
        """Kernels and copies in a step, as it was captured; None without CUDA, or where it lets nobody watch."""
        if self._base.device.type != "cuda":
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            graphs._step.run(self._bucket(graphs, rows))
            self._wait()
        return sum(event.device_type.name == "CUDA" for event in seen.events() or []) or None

    def _floor(self, rows: int) -> float | None:
        """The seconds in which the card reads the base's weights, and the rows' keys and values, once."""
        with suppress(StopIteration):
            bandwidth = next(speed for name, speed in BANDWIDTHS.items() if name in gpu_name(self._base.device))
            model = self._base.adapted.model
            weights = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
            return (weights + rows * self._sizes.context * self.kv.bytes_per_token) / bandwidth
        return None

    def _wait(self) -> None:
        if self._base.device.type == "cuda":
            torch.cuda.synchronize()


_NO_FACTORS = LayerFactors(torch.empty(0, 0), torch.empty(0, 0))


def variant(template: TopKCheckpoint, n: int) -> TopKCheckpoint:
    """Another adapter of the same shape: every tensor differs."""
    return replace(
        template,
        bank=VectorBank(template.bank.vectors.roll(n)),
        indices=template.indices.roll(n, dims=0),
        weights=template.weights.roll(n, dims=0),
    )


def checkpoint_names(checkpoint: TopKCheckpoint) -> list[str]:
    return [layer.name for layer in checkpoint.layout.layers]


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
