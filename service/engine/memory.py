"""What the process takes of the machine's memory and of the device's, as the operating system and PyTorch count it."""

from __future__ import annotations

import os

import torch

_STATM = "/proc/self/statm"


def process_bytes() -> int | None:
    """The process's resident memory; None where the operating system does not tell (it is Linux that does)."""
    try:
        with open(_STATM, encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def device_bytes(device: str) -> int | None:
    """What PyTorch has reserved of a device's own memory, tensors and room for more; None for the CPU."""
    if not device.startswith("cuda"):
        return None
    return int(torch.cuda.memory_reserved(device))
