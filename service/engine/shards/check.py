"""Whether a model can be held in parts, before any process is started."""

from __future__ import annotations

import torch

from service.engine.base_model import BaseModelError, pick_device, without_weights
from service.engine.pooling.base import Unservable
from service.engine.quantization import method_of
from service.engine.shards.plan import Shard, plan_of
from service.engine.task import Task


def check_splittable(model: str, size: int, device: str) -> None:
    """By its config alone: no weights are read. Raises BaseModelError."""
    if pick_device(device).type == "cuda" and size > torch.cuda.device_count():
        raise BaseModelError(
            f"tensor_parallel is {size}, but this machine shows {torch.cuda.device_count()} CUDA devices: each part "
            "needs one of its own"
        )
    empty, config = without_weights(model, Task.GENERATE)
    if (method := method_of(config)) is not None:
        raise BaseModelError(
            f"the checkpoint {model!r} is quantized ({method}): --tensor-parallel cuts plain weights; give the "
            "checkpoint it was made from"
        )
    try:
        plan_of(empty, Shard(0, size))
    except Unservable as error:
        raise BaseModelError(f"the model {model!r} cannot be cut into {size} parts: {error}") from error
