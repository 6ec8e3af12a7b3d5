"""For every test: one thread for torch, no network for the Hub's clients, asyncio, hypothesis without a clock."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the Hub's client, which reads it once

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# No test fails by time, nor by an input that nobody can reproduce: where CI is set, inputs are the same each time.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("default")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
