"""What graphs need of a device: to capture a step and replay it, and kernels that may be captured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from adapters.kernels import reference
from adapters.kernels.delta import PairKernels

_CACHE_BYTES = 256 << 20  # more than any GPU's

Step = Callable[[], None]  # reads and writes tensors that stay where they are


class GraphBackend(Protocol):
    """Captures steps. `kernels` stand in for Triton's; `captures` counts."""

    captures: int
    kernels: PairKernels | None

    def capture(self, step: Step) -> Step:
        """Runs a step to warm up, and returns what runs the same again on whatever its tensors then hold."""
        ...

    def seconds(self, replay: Step) -> float:
        """What a replay takes that finds nothing in the device's cache."""
        ...


class CaptureFailed(RuntimeError):
    """A step cannot be captured; the device is well."""


class CudaGraphs:
    """Implements GraphBackend by CUDA graphs that share one memory pool: they replay one after the other."""

    kernels: PairKernels | None = None

    def __init__(self, device: torch.device) -> None:
        self.captures = 0
        self._device = device
        self._aside: Any = None  # a stream: nothing is captured on the default one
        self._pool: Any = None

    def capture(self, step: Step) -> Step:
        """Raises CaptureFailed, or what the device has failed with."""
        try:
            graph = self._captured(step)
        except Exception as error:
            # What CUDA refuses while it captures looks like a failure of the device. This raises if it is one.
            torch.cuda.synchronize(self._device)
            raise CaptureFailed(f"{type(error).__name__}: {error}") from error
        self._pool = self._pool or graph.pool()
        self.captures += 1
        replay: Step = graph.replay
        return replay

    def _captured(self, step: Step) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self._device):
            self._aside = self._aside or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream()
            self._aside.wait_stream(current)
            with torch.cuda.stream(self._aside):
                step()  # compiles kernels, makes workspaces
                step()
            current.wait_stream(self._aside)
            graph = torch.cuda.CUDAGraph()
            # Threads that load adapters may allocate meanwhile: that is no fault of this capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._aside, capture_error_mode="thread_local"):
                step()
        return graph

    def seconds(self, replay: Step) -> float:
        torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=self._device).zero_()  # drives all else out of the cache
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


@dataclass(slots=True)
class Recorded:
    """Implements GraphBackend where there are no graphs: a replay calls the step again. For tests on a CPU."""

    captures: int = 0
    kernels: PairKernels | None = reference

    def capture(self, step: Step) -> Step:
        step()
        self.captures += 1
        return step

    def seconds(self, replay: Step) -> float:
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
