"""Puts an engine together over an encoder-decoder."""

from __future__ import annotations

import logging
from dataclasses import replace

from adapters.factors import FactorStack
from adapters.merge import Merger
from adapters.registry import AdapterRegistry
from service.engine.auto_merge import AutoMerge
from service.engine.base_model import LoadedBase
from service.engine.engine import BatchEngine
from service.engine.limits import EngineLimits
from service.engine.scheduler import Limits
from service.engine.seq2seq.self_test import choose_seq2seq_runner
from service.engine.worker import Worker

log = logging.getLogger(__name__)


def build_seq2seq_engine(
    base: LoadedBase,
    registry: AdapterRegistry,
    rows: Limits,
    doors: EngineLimits,
    *,
    kv_memory: int,
    auto_merge: bool,
) -> BatchEngine:
    """An engine that has not been started. Raises BaseModelError."""
    assert base.seq2seq is not None
    rules = base.seq2seq.rules
    runner, batches = choose_seq2seq_runner(base.adapted, base.device, base.vocabulary, kv_memory, rules)
    backend = runner.name if batches else "solo"
    log.info("tested how rows are run", extra={"kv_backend": backend, "batches": batches})
    worker = Worker(
        runner,
        Merger(base.adapted),
        replace(rows if batches else Limits.solo(), whole_prompts=True),
        base.eos_token_ids,
        auto_merge=AutoMerge() if auto_merge else None,
        stack=FactorStack(base.adapted.siblings),
        opening=(rules.start,),
    )
    return BatchEngine(worker, registry, base.tokenizer, doors, kv_backend=backend)
