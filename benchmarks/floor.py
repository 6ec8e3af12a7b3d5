"""What this machine cannot go below: bytes to read and products to compute, at the speeds that it reaches itself.

Both speeds are measured in the same run. The floor leaves out attention, adapters and all that is not a product, so
that it is no server's estimate: nothing that computes these tokens in this dtype on this machine is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.sizes import ModelShape
from benchmarks.stage import Stage
from service.engine.sequence import GenerationRequest
from service.engine.threads import in_own_thread

_READ_BYTES = 256 << 20
_SIDE = 1536
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Floor:
    """`read_bytes` are the weights that a step reads, `operations` those of one token's products."""

    read_bytes: int
    operations: int
    bytes_per_s: float
    operations_per_s: float
    dtype: torch.dtype = torch.float32

    def step_s(self, tokens: int | float, factor_bytes: int = 0) -> float:
        """A step over so many tokens: weights and factors are read once, however many tokens there are."""
        reading = (self.read_bytes + factor_bytes) / self.bytes_per_s
        return max(reading, tokens * self.operations / self.operations_per_s)

    def of(self, requests: Sequence[GenerationRequest], rows: int) -> dict[str, float]:
        """The best that rows together can give: of the throughput, and the least of both latencies."""
        prompts = [len(request.prompt_ids) for request in requests]
        output = sum(request.params.max_new_tokens for request in requests)
        seconds = sum(prompts) * self.operations / self.operations_per_s + output / rows * self.step_s(rows)
        return {
            "tokens_per_s": output / seconds,
            "first_token_ms": 1000 * self.step_s(sum(prompts) / len(prompts)),
            "inter_token_ms": 1000 * self.step_s(rows),
        }

    def described(self) -> dict[str, Any]:
        return {
            "read_mb": self.read_bytes / 1e6,
            "gigabytes_per_s": self.bytes_per_s / 1e9,
            "gigaflops": self.operations_per_s / 1e9,
            "step_1_row_ms": 1000 * self.step_s(1),
        }


def measure_floor(stage: Stage, shape: ModelShape) -> Floor:
    read = stage.base.parameters - shape.vocabulary * shape.hidden  # of the input embeddings a token reads one row
    dtype = stage.base.dtype
    bytes_per_s, operations_per_s = in_own_thread(stage.threads, partial(_speeds, dtype))
    return Floor(read * dtype.itemsize, 2 * read, bytes_per_s, operations_per_s, dtype)


def _speeds(dtype: torch.dtype) -> tuple[float, float]:
    data = torch.ones(_READ_BYTES // 4)
    square = torch.ones(_SIDE, _SIDE, dtype=dtype)
    return _READ_BYTES / _best_s(data.sum), 2 * _SIDE**3 / _best_s(partial(torch.mm, square, square))


def _best_s(run: Callable[[], Any]) -> float:
    """The fastest of some tries: a floor is not to be raised by what else the machine does."""
    took = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return min(took)
