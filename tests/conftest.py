"""For every test: one thread for torch, no network for the Hub's clients, asyncio, hypothesis without a clock."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the Hub's client, which reads it once
# Before anything imports Triton: kernels are interpreted, on the CPU. tests/gpu compiles in a process of its own.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator

import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.fake_hub import FakeHub

torch.set_num_threads(1)

# No test fails by time, nor by an input that nobody can reproduce: where CI is set, inputs are the same each time.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("default")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub of this test's own, which the Hub's client asks in place of the real one."""
    fake = FakeHub()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()  # one made before would use another test's proxy settings
    yield fake
    huggingface_hub.close_session()
    fake.close()
