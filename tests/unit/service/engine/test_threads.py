"""Each thread computes with as many threads as it was told, whatever others were told later."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from service.engine.threads import compute_with, in_own_thread


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    compute_with(before)


def test_a_threads_own_number_outlives_what_others_set() -> None:
    told, asked = threading.Event(), threading.Event()
    seen: list[int] = []

    def compute() -> None:
        compute_with(3)
        told.set()
        assert asked.wait(10)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=compute)
    thread.start()
    assert told.wait(10)
    compute_with(1)
    asked.set()
    thread.join(10)
    assert (seen, torch.get_num_threads()) == ([3], 1)


def test_a_thread_of_its_own_answers_and_raises() -> None:
    compute_with(1)
    assert in_own_thread(2, lambda: (torch.get_num_threads(), threading.current_thread().name)) == (2, "vblora-once")
    assert torch.get_num_threads() == 1
    with pytest.raises(ZeroDivisionError):
        in_own_thread(2, lambda: 1 / 0)
    assert not any(thread.name == "vblora-once" for thread in threading.enumerate())
