"""How many threads PyTorch computes with, thread by thread.

On a CPU each of our threads that computes has a team of OpenMP workers of its own. libgomp lets workers wait actively
from one operation to the next only while the process has no more of them than processors; beyond that they sleep, and
every operation of a step pays for waking them: with a second team around, a batch's tokens took 1.4 times as long. So
one thread at a time computes in parallel, the model's, and all others compute alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")


def compute_with(threads: int) -> None:
    """Sets how many threads the calling thread computes with, and the default of threads that compute later."""
    torch.set_num_threads(threads)
    torch.get_num_threads()  # PyTorch takes the default over at a thread's first question or operation: this one


def in_own_thread(threads: int, run: Callable[[], T]) -> T:
    """What `run` returns, or raises, on a thread that computes with so many and whose workers end with it."""
    answer: Future[T] = Future()

    def body() -> None:
        compute_with(threads)
        try:
            answer.set_result(run())
        except BaseException as error:
            answer.set_exception(error)

    thread = threading.Thread(target=body, name="vblora-once", daemon=True)  # a signal may end the process meanwhile
    thread.start()
    try:
        return answer.result()
    finally:
        if answer.done():
            thread.join()
