"""Packs a base model's linear weights, and finds out whether the model still answers as before.

Some models read the weight of a layer themselves instead of running the layer; those are left as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from adapters.packed import pack_linear_layers, unpack_linear_layers

log = logging.getLogger(__name__)

_TOKENS = 6
_TOLERANCE = 1e-3  # of the largest value: packed products sum in another order
_OF_16_BITS = 0.1  # and each layer's rounding counts


def pack_model(model: Any) -> int:
    """Packs the linear layers of a transformers model, in place; how many were, 0 if it would answer differently."""
    before = _answer(model)
    if before is None:
        return 0
    count = pack_linear_layers(model)
    if count and not _alike(before, _answer(model)):
        log.warning("%s answers differently with packed weights: they stay as they are", type(model).__name__)
        unpack_linear_layers(model)
        return 0
    return count


@torch.inference_mode()
def _answer(model: Any) -> Tensor | None:
    """What a model makes of a few tokens; None if it cannot be asked this way."""
    generator = torch.Generator().manual_seed(0)
    try:
        words = model.get_input_embeddings().num_embeddings
        ids = torch.randint(words, (1, _TOKENS), generator=generator).to(model.device)
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        answer: Tensor = model(input_ids=ids, **more)[0]
        return answer
    except Exception as error:
        log.info("%s cannot be asked about packed weights: %s", type(model).__name__, error)
        return None


def _alike(before: Tensor, after: Tensor | None) -> bool:
    if after is None or not bool(after.isfinite().all()):
        return False
    tolerance = _TOLERANCE if before.dtype is torch.float32 else _OF_16_BITS
    return float((after.float() - before.float()).abs().max()) <= tolerance * float(before.float().abs().max())
