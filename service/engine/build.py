"""Puts an engine together over a loaded base model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from adapters.factors import FactorStack
from adapters.merge import Merger
from adapters.registry import AdapterRegistry
from service.engine.auto_merge import AutoMerge
from service.engine.base_model import BaseModelError, LoadedBase
from service.engine.engine import BatchEngine
from service.engine.graphs.capture import GraphBackend
from service.engine.graphs.setup import GraphOptions, attach_graphs
from service.engine.limits import EngineLimits
from service.engine.pooling.build import build_pooling_engine
from service.engine.prefix_cache import PrefixCache
from service.engine.scheduler import Limits
from service.engine.self_test import choose_runner
from service.engine.seq2seq.build import build_seq2seq_engine
from service.engine.shards import messages
from service.engine.shards.leader import lead
from service.engine.shards.team import Team
from service.engine.worker import Worker

log = logging.getLogger(__name__)


_RESERVED_SHARE = 8  # of every so many rows, one more is held in reserve
_SCORED_BYTES = 128 << 20  # for the token logits of the prompts that one step scores
_LEAST_SCORED = 32


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The engine's settings. `max_context` 0 is the model's own limit; `kv_memory` is in bytes."""

    max_batch_size: int = 16
    max_queue: int = 256
    max_context: int = 0
    kv_memory: int = 2 << 30
    prefill_tokens: int = 512
    prefix_cache: bool = True
    auto_merge: bool = False
    graphs: GraphOptions = field(default_factory=GraphOptions)
    pooled_tokens: int = 8192


def build_engine(
    base: LoadedBase,
    registry: AdapterRegistry,
    options: EngineOptions | None = None,
    *,
    graph_backend: GraphBackend | None = None,
    team: Team | None = None,
) -> BatchEngine:
    """An engine that has not been started. Tests first which key-value backend is right for the model.

    Where the device has graphs, or with a `graph_backend`, decode steps are captured, for the adapters registered so
    far and those like them; not with a `team`, which holds the other parts of the model. Raises BaseModelError for a
    context longer than the model's, for folding into a quantized model, or for a model that cannot be served.
    """
    options = options or EngineOptions()
    if options.max_context > base.context:
        raise BaseModelError(f"max_context is {options.max_context} but the model's is {base.context}; lower it")
    if options.auto_merge and base.quantization is not None:
        raise BaseModelError(
            f"auto_merge folds adapters into the base model's weights, which are quantized ({base.quantization}): "
            "leave out one of the two"
        )
    max_context = options.max_context or min(base.context, base.usual_context)
    doors = EngineLimits(max_context, base.vocabulary, options.max_queue, base.task)
    if base.task.pools:
        rows = _limits(options, base.vocabulary)
        return build_pooling_engine(base, registry, rows, doors, tokens=options.pooled_tokens)
    if base.seq2seq is not None:
        prompt, output = base.seq2seq.limits(options.max_context)
        doors = replace(doors, max_context=prompt, max_output=output)
        rows, auto_merge = _limits(options, base.vocabulary), options.auto_merge
        return build_seq2seq_engine(base, registry, rows, doors, kv_memory=options.kv_memory, auto_merge=auto_merge)
    if team is not None:
        team.tell(messages.Choose(options.kv_memory, max_context))
    runner, batches = choose_runner(base.adapted, base.device, base.vocabulary, options.kv_memory, max_context)
    log.info("chose the key-value backend", extra={"kv_backend": runner.kv.name, "batches": batches})
    limits = _limits(options, base.vocabulary) if batches else Limits.solo()
    most = limits.max_batch_size + limits.reserve
    runner.kv.reserve(most, max_context)
    if team is None:
        attach_graphs(base, runner, registry.layouts, options.graphs, graph_backend)
    worker = Worker(
        runner if team is None else lead(runner, team, batches, most, max_context),
        Merger(base.adapted),
        limits,
        base.eos_token_ids,
        # Half of the memory at most: what rows need comes first, and shrinks the cache when it must.
        PrefixCache(options.kv_memory // 2) if options.prefix_cache and batches else None,
        AutoMerge() if options.auto_merge else None,
        FactorStack(base.adapted.siblings),
    )
    backend = runner.kv.name if batches else "solo"
    return BatchEngine(worker, registry, base.tokenizer, doors, kv_backend=backend, graphs=runner.graphs)


def _limits(options: EngineOptions, vocabulary: int) -> Limits:
    reserve = max(1, options.max_batch_size // _RESERVED_SHARE)
    scored = max(_LEAST_SCORED, _SCORED_BYTES // (4 * vocabulary))  # float32
    return Limits(options.max_batch_size, reserve, options.prefill_tokens, scored)
