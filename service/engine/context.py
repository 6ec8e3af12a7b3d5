"""How many tokens a row of a base model may have, by its config."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from service.engine.pooling.base import PooledBase

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096  # for the few architectures whose config names no limit (ALiBi)


def context_of(config: Any, pooled: PooledBase | None) -> int:
    """The most tokens of a row.

    With LongRoPE, no more than the model was first trained on: beyond, the longest row of a batch decides how the
    positions of all are turned, and those cached before were turned otherwise.
    """
    text = config.get_text_config()
    longest = _longest(text)
    limit = min([longest, *_lengths_that_change_positions(text)])
    if limit < longest:
        log.warning("%s turns positions otherwise beyond %d tokens: that is the context", config.model_type, limit)
    return min(limit, (pooled and pooled.context) or limit)


def _lengths_that_change_positions(config: Any) -> Iterator[int]:
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [
        given,
        *(each for each in given.values() if isinstance(each, dict)),
    ]  # one for all layers, or by their kind
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            own = getattr(config, "original_max_position_embeddings", None)
            length = kind.get("original_max_position_embeddings") or own
            if isinstance(length, int) and length > 0:
                yield length


def _longest(text: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len"):
        if isinstance(length := getattr(text, name, None), int) and length > 0:
            return length
    return DEFAULT_CONTEXT
