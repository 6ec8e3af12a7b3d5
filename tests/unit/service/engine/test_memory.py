"""What the process takes of memory, held against the memory that a test takes."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from service.engine import memory

TAKEN = 64 << 20


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the operating system does not tell")
def test_memory_that_is_taken_is_counted() -> None:
    before = memory.process_bytes()
    # Pages mapped anew: an allocation of Python's may come out of memory that earlier tests gave back to the heap.
    with mmap.mmap(-1, TAKEN, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:
        taken[:: mmap.PAGESIZE] = b"x" * (TAKEN // mmap.PAGESIZE)  # every page written to, so that it is there
        after = memory.process_bytes()
    assert before is not None
    assert after is not None
    assert TAKEN * 0.8 < after - before < TAKEN * 3


def test_where_nobody_tells_it_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATM", str(tmp_path / "none"))
    assert memory.process_bytes() is None


def test_a_cpu_has_no_memory_of_its_own() -> None:
    assert memory.device_bytes("cpu") is None


def test_a_devices_memory_is_what_is_reserved_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.memory_reserved", {"cuda:1": 5, "cuda": 7}.__getitem__)
    assert (memory.device_bytes("cuda:1"), memory.device_bytes("cuda")) == (5, 7)
