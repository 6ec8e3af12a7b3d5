"""Puts an engine together over a loaded base model."""

from __future__ import annotations

import logging

from adapters.merge import Merger
from adapters.registry import AdapterRegistry
from service.engine.base_model import BaseModelError, LoadedBase
from service.engine.engine import BatchEngine, EngineLimits
from service.engine.model_runner import TransformersRunner, batching_is_exact
from service.engine.worker import Worker

log = logging.getLogger(__name__)


def build_engine(
    base: LoadedBase,
    registry: AdapterRegistry,
    *,
    max_batch_size: int = 16,
    max_queue: int = 256,
    max_context: int = 0,
) -> BatchEngine:
    """An engine that has not been started. `max_context` 0 is the model's own limit, which it may not exceed.

    Tests first whether rows of different lengths come out the same batched and alone; an architecture that
    cannot be batched that way is run one row at a time. Raises BaseModelError for a context longer than the model's.
    """
    if max_context > base.context:
        raise BaseModelError(f"max_context is {max_context} but the model's context is {base.context}; lower it")
    runner = TransformersRunner(base.adapted, base.device)
    if max_batch_size > 1 and not batching_is_exact(runner, base.vocabulary):
        log.warning("%s models answer differently in padded batches: running one row at a time", base.model_type)
        max_batch_size = 1
    worker = Worker(runner, Merger(base.adapted), max_batch_size, base.eos_token_ids)
    limits = EngineLimits(max_context or base.context, base.vocabulary, max_queue)
    return BatchEngine(worker, registry, base.tokenizer, limits)
