"""Which errors end the process's computing."""

from __future__ import annotations

import torch


class ShardsLost(Exception):
    """One of the processes that hold parts of the model is gone, or out of step: no answer can be computed any more."""


def is_fatal(error: Exception) -> bool:
    """A CUDA error leaves the device's state unknown: nothing more can be computed in this process. Nor without a part
    of the model."""
    if isinstance(error, ShardsLost):
        return True
    return isinstance(error, getattr(torch, "AcceleratorError", ()))  # not there before PyTorch 2.8
