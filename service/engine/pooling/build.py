"""Puts an engine together that reads texts once, over a loaded base model."""

from __future__ import annotations

import logging

from adapters.factors import FactorStack
from adapters.merge import Merger
from adapters.registry import AdapterRegistry
from service.engine.base_model import LoadedBase
from service.engine.engine import BatchEngine
from service.engine.limits import EngineLimits
from service.engine.pooling.runner import Readout, embeddings, label_logits
from service.engine.pooling.self_test import choose_pooling_runner
from service.engine.pooling.worker import PoolingLimits, PoolingWorker
from service.engine.scheduler import Limits
from service.engine.task import Task

log = logging.getLogger(__name__)


def build_pooling_engine(
    base: LoadedBase, registry: AdapterRegistry, rows: Limits, doors: EngineLimits, *, tokens: int
) -> BatchEngine:
    """An engine that has not been started. `tokens` bounds a forward, padding included. Raises BaseModelError."""
    assert base.pooled is not None
    pooled = base.pooled
    readout: Readout = label_logits
    if base.task is Task.EMBED:
        readout = embeddings(pooled.pooling, normalize=pooled.normalize)
    runner, batches = choose_pooling_runner(base.adapted, base.device, base.vocabulary, readout, pooled.pad)
    log.info("tested how texts are read", extra={"padded": runner.ragged, "batches": batches})
    worker = PoolingWorker(
        runner,
        Merger(base.adapted),
        PoolingLimits(rows if batches else Limits.solo(), tokens),
        head=base.adapted.head,
        stack=FactorStack(base.adapted.siblings),
    )
    return BatchEngine(worker, registry, base.tokenizer, doors)
