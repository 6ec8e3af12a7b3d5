"""Registries of adapters on a tiny Llama, and what tests do with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from adapters.binding import BaseIdentity
from adapters.layers import AdaptedModel
from adapters.registry import AdapterRegistry
from adapters.status import AdapterState
from adapters.store import AdapterRecord, AdapterStore
from tests.factories import WEIGHTS_FILE, AdapterSpec, tiny_model

LLAMA = tiny_model("llama")
IDENTITY = BaseIdentity(frozenset({"org/base"}))
SPEC = AdapterSpec(target_modules=["q_proj"])
FACTOR_BYTES = 4 * 2 * 4 * (64 + 64)  # float32, two layers, rank 4


def make_registry(store: AdapterStore, model: AdaptedModel, budget: int) -> AdapterRegistry:
    return AdapterRegistry(store, model, IDENTITY, factor_budget=budget, device=torch.device("cpu"))


def register(registry: AdapterRegistry, source: Path, name: str | None = None, **options: bool) -> AdapterRecord:
    with registry.store.staging() as staged:
        shutil.copytree(source, staged, dirs_exist_ok=True)
        return registry.register("", name or source.name, staged, **options)


def digests(registry: AdapterRegistry, written: dict[str, Path]) -> dict[str, str]:
    """All of them registered."""
    return {name: register(registry, path).digest for name, path in written.items()}


def state(registry: AdapterRegistry, digest: str) -> AdapterState:
    return registry.status(digest).state


def delete(registry: AdapterRegistry, name: str) -> None:
    record = registry.store.delete("", name)
    registry.forget_deleted([version.digest for version in record.versions])


def flip_a_bit(store: AdapterStore, digest: str, file: str = WEIGHTS_FILE) -> None:
    path = store.path(digest) / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
