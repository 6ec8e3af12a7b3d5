"""Which errors end the process's computing."""

from __future__ import annotations

import torch


def is_fatal(error: Exception) -> bool:
    """A CUDA error leaves the device's state unknown: nothing more can be computed in this process."""
    return isinstance(error, getattr(torch, "AcceleratorError", ()))  # not there before PyTorch 2.8
