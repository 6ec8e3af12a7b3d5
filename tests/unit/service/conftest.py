"""A base and its adapters on the disk, and a process whose variables and logging commands may use."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("VBLORA_")]:
        monkeypatch.delenv(variable)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def base(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(model, tmp_path_factory.mktemp("base") / "tiny-base")


@pytest.fixture(scope="module")
def compact(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, AdapterSpec(seed=1), tmp_path_factory.mktemp("adapters") / "compact")


@pytest.fixture(scope="module")
def full(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, AdapterSpec(seed=1, compact=False), tmp_path_factory.mktemp("adapters") / "full")


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers
