"""For every test: one thread for torch, no network for the Hub's clients, asyncio for async tests."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the Hub's client, which reads it once

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
