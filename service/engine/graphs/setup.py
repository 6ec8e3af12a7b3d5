"""Puts decode graphs together at load: which kernels, tables of which size, which buckets; then captures them all.

What cannot be, or goes wrong, is logged, and decoding runs eagerly as without graphs: never a dead engine.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd

import torch

from adapters.kernels.choice import faster_pair
from adapters.kernels.delta import Pair
from adapters.kernels.model_tables import TABLES, LayerGroup, TableSpec, layer_groups
from adapters.kernels.residency import SlotResidency
from adapters.kernels.table_batch import TableBatch
from adapters.kernels.tables import RowTable
from adapters.kernels.trial import compute_rightly
from adapters.layout import AdapterLayout
from adapters.reading import AnyLayout
from adapters.targets import BaseModules, LayerShape
from service.engine.base_model import LoadedBase
from service.engine.fatal import is_fatal
from service.engine.graphs.buckets import Buckets
from service.engine.graphs.capture import CudaGraphs, GraphBackend
from service.engine.graphs.decode import DecodeGraphs
from service.engine.graphs.static_step import StaticStep, StepBuffers
from service.engine.kv.slots import SlotBackend
from service.engine.model_runner import TransformersRunner
from service.engine.self_test import replay_agrees

log = logging.getLogger(__name__)

OFF, AUTO = "off", "auto"
PAIRS = {"bank-direct": Pair.BANK_DIRECT, "gathered": Pair.GATHERED}
CHOICES = (AUTO, *PAIRS, OFF)

_MEMBERS = 4  # of a blend: larger ones decode eagerly
_MOST_SLOTS = 1 << 16
_LENGTH, _VECTORS, _RANK, _TOPK = 256, 256, 4, 2  # of adapters to come, where none is known: the paper's
_MOST_RANK = 16  # one adapter of a high rank would make every slot as large


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """`kernels` is one of CHOICES; `memory` bytes at most are for the tables; `most` graphs are captured."""

    kernels: str = AUTO
    memory: int = 1 << 30
    most: int = 64


def attach_graphs(
    base: LoadedBase,
    runner: TransformersRunner,
    layouts: Iterable[AnyLayout],
    options: GraphOptions,
    backend: GraphBackend | None = None,
) -> None:
    """Gives a runner graphs for all decode steps that may come, captured and tested; unless they are off or cannot be.

    Without rows, after room for them is reserved. `backend` is the device's own unless given: CUDA has one, a CPU has
    none. `layouts` are of the adapters known so far, which the tables are made for.
    """
    if options.kernels == OFF:
        return
    if backend is None and base.device.type == "cuda":
        backend = CudaGraphs(base.device)
    if backend is None or not isinstance(runner.kv, SlotBackend):
        if options.kernels != AUTO:
            where = f"{base.device.type}, {runner.kv.name} keys and values"
            log.warning("decode kernels need CUDA and the slot backend, not %s: decoding runs without graphs", where)
        return
    began = time.perf_counter()
    try:
        pair, graphs = prepared(base, runner, runner.kv, list(layouts), options, backend)
        graphs.warm_up()
        runner.graphs = graphs
        if not replay_agrees(runner, base.adapted, base.device, base.vocabulary):
            raise ValueError("replayed steps answer differently than the model")
    except Exception as error:
        if is_fatal(error):
            raise
        runner.graphs = None
        log.warning("decoding runs without graphs: %s: %s", type(error).__name__, error)
        return
    facts = {"kernels": pair.value, "graphs": len(graphs.buckets.all()), "slots": graphs.residency.slots}
    log.info("captured decode steps", extra={**facts, "seconds": round(time.perf_counter() - began, 1)})


def prepared(
    base: LoadedBase,
    runner: TransformersRunner,
    kv: SlotBackend,
    layouts: list[AnyLayout],
    options: GraphOptions,
    backend: GraphBackend,
) -> tuple[Pair, DecodeGraphs]:
    """Graphs that nothing has been captured of, and the kernels they run. Raises if they cannot be."""
    spec = table_spec(layouts, _served_layers(base.modules), base.dtype)
    groups = groups_of(base, spec)
    if not groups:
        raise ValueError(f"vectors of {spec.vector_length} tile none of the model's layers")
    pair = PAIRS.get(options.kernels) or faster_pair(groups, spec, kv.slots, base.device, backend)
    if pair is Pair.GATHERED:
        groups = groups_of(base, replace(spec, vector_length=1))  # factors are not made of tiles
    tables = TABLES[pair](groups, spec, _slots(pair, groups, spec, options.memory), base.device)
    rows = RowTable(kv.slots, _MEMBERS, device=base.device)
    deltas = tables.deltas(rows, backend.kernels)
    if not compute_rightly(tables, spec, rows, deltas):
        raise ValueError(f"the {pair.value} kernels compute something else than they should")
    buffers = StepBuffers(kv.slots, base.vocabulary, base.device)
    step = StaticStep(
        base.adapted,
        kv,
        buffers,
        TableBatch(groups, deltas),
        takes_positions=runner.takes_positions,
        keeps_last_logits=runner.keeps_last_logits,
    )
    buckets = Buckets.of(kv.slots, kv.columns, most=options.most)
    return pair, DecodeGraphs(base.adapted, kv, step, buffers, rows, SlotResidency(tables), buckets, backend)


def _slots(pair: Pair, groups: list[LayerGroup], spec: TableSpec, memory: int) -> int:
    size = TABLES[pair].slot_bytes(groups, spec)
    if size > memory:
        raise ValueError(f"one adapter takes {size:,} bytes of the tables, and --decode-memory is {memory:,}")
    return min(memory // size, _MOST_SLOTS)


def groups_of(base: LoadedBase, spec: TableSpec) -> list[LayerGroup]:
    """The layers that the tables hold, by what they read."""
    return layer_groups(_served_layers(base.modules), base.adapted.siblings, vector_length=spec.vector_length)


def _served_layers(modules: BaseModules) -> dict[str, LayerShape]:
    """All linear layers but the output layer, whose outputs are many and whose adapters are few."""
    return {name: layer for name, layer in modules.layers.items() if name != modules.output_layer}


def table_spec(layouts: Iterable[AnyLayout], layers: Mapping[str, LayerShape], dtype: torch.dtype) -> TableSpec:
    """Tables for the VB-LoRA adapters known, and for others like them; their commonest vector length decides."""
    configs = [layout.config for layout in layouts if isinstance(layout, AdapterLayout)]
    lengths = Counter(config.vector_length for config in configs)
    features = [features for layer in layers.values() for features in (layer.in_features, layer.out_features)]
    length = lengths.most_common(1)[0][0] if lengths else gcd(_LENGTH, *features)
    fitting = [config for config in configs if config.vector_length % length == 0]
    return TableSpec(
        rank=min(max([_RANK, *(config.r for config in fitting)]), _MOST_RANK),
        topk=max([_TOPK, *(config.topk for config in fitting)]),
        vector_length=length,
        num_vectors=max([_VECTORS, *(config.num_vectors * config.vector_length // length for config in fitting)]),
        dtype=dtype,
    )
