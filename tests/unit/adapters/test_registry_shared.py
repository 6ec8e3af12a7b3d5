"""A registry on a shared store: adapters are checked when they are first used, and what others change arrives."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from adapters.binding import BaseIdentity
from adapters.errors import (
    AdapterNotFound,
    AdapterUnavailable,
    BaseModelMismatch,
    NoTargetMatched,
    StoreUnavailable,
)
from adapters.layers import AdaptedModel
from adapters.registry import AdapterRegistry
from adapters.status import AdapterState
from adapters.store import AdapterRecord
from adapters.store.shared import SharedAdapterStore, open_objects
from adapters.store.shared.objects import ObjectStore
from tests.factories import AdapterSpec, make_adapter, tiny_model
from tests.unit.adapters.shared_support import shared
from tests.unit.adapters.support import adapted

LLAMA = tiny_model("llama")
Opener = Callable[..., AdapterRegistry]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = AdapterSpec(target_modules=["q_proj"], base_model_name_or_path="org/base")
    return make_adapter(LLAMA, spec, tmp_path_factory.mktemp("adapters") / "sql")


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return open_objects(f"file://{tmp_path}/objects")


@pytest.fixture
def server(tmp_path: Path, objects: ObjectStore) -> Iterator[Opener]:
    """Opens a server's registry with a store of its own on the same objects."""
    with ExitStack() as opened:
        count = 0

        def server(
            model: AdaptedModel | None = None, names: frozenset[str] = frozenset({"org/base"})
        ) -> AdapterRegistry:
            nonlocal count
            count += 1
            store = shared(objects, tmp_path / f"data-{count}")
            opened.callback(store.close)
            identity = BaseIdentity(names)
            registry = AdapterRegistry(
                store, model or adapted(LLAMA), identity, factor_budget=1 << 24, device=torch.device("cpu")
            )
            store.listen(registry.note_changes)
            return registry

        yield server


def register(registry: AdapterRegistry, source: Path, **options: bool) -> AdapterRecord:
    with registry.store.staging() as staged:
        shutil.copytree(source, staged, dirs_exist_ok=True)
        return registry.register("", "sql", staged, **options)


def store_of(registry: AdapterRegistry) -> SharedAdapterStore:
    assert isinstance(registry.store, SharedAdapterStore)
    return registry.store


def test_a_start_brings_no_files(server: Opener, adapter: Path) -> None:
    digest = register(server(), adapter).digest
    other = server()
    assert other.check_stored() == 0
    assert not other.store.path(digest).exists()
    assert other.status(digest).state is AdapterState.STORED
    assert other.pin(digest).layers
    assert other.store.path(digest).is_dir()


def test_one_for_another_base_fails_when_it_is_used_and_says_why(server: Opener, adapter: Path) -> None:
    digest = register(server(), adapter).digest
    other = server(names=frozenset({"another/base"}))
    with pytest.raises(BaseModelMismatch):
        other.pin(digest)
    status = other.status(digest)
    assert status.state is AdapterState.FAILED
    assert "org/base" in (status.reason or "")
    with pytest.raises(AdapterUnavailable, match="org/base"):
        other.pin(digest)


def test_one_that_was_taken_although_is_served(server: Opener, adapter: Path) -> None:
    one = server(names=frozenset({"another/base"}))
    digest = register(one, adapter, allow_base_mismatch=True).digest
    assert server(names=frozenset({"another/base"})).pin(digest).layers


def test_one_that_fits_no_layer_fails_alone(server: Opener, adapter: Path) -> None:
    digest = register(server(), adapter).digest
    with pytest.raises(NoTargetMatched):
        server(adapted(tiny_model("gpt2"))).pin(digest)


def test_what_was_refused_is_tried_again_when_it_is_published_otherwise(server: Opener, adapter: Path) -> None:
    """By a server that allows the mismatch: the infos differ, the files do not."""
    one, other = server(), server(names=frozenset({"another/base"}))
    digest = register(one, adapter).digest
    store_of(other).refresh()
    with pytest.raises(BaseModelMismatch):
        other.pin(digest)
    one.store.delete("", "sql")
    register(one, adapter, allow_base_mismatch=True)
    store_of(other).refresh()
    assert other.pin(digest).layers


def test_what_others_delete_leaves_memory_with_its_last_pin(server: Opener, adapter: Path) -> None:
    one, other = server(), server()
    digest = register(one, adapter).digest
    store_of(other).refresh()
    other.pin(digest)
    assert other.resident_bytes()[0] > 0
    one.store.delete("", "sql")
    store_of(other).refresh()
    assert other.resident_bytes()[0] > 0, "a request runs with it"
    other.unpin(digest)
    assert other.resident_bytes() == (0, 0)
    with pytest.raises(AdapterNotFound):
        other.pin(digest)


def test_files_that_cannot_be_had_now_may_be_had_later(server: Opener, adapter: Path) -> None:
    one = server()
    digest = register(one, adapter).digest
    other = server()
    store_of(one)._blobs.remove(digest)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="missing"):
            other.pin(digest)
    assert other.status(digest).state is AdapterState.STORED
    store_of(one)._blobs.put(digest, one.store.path(digest))
    assert other.pin(digest).layers
