"""What the tests of `adapters` are given: stores of their own, and adapters of a tiny Llama to register."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from adapters.layers import AdaptedModel
from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from adapters.store.shared.objects import ObjectStore
from tests.factories import AdapterSpec, make_adapter
from tests.unit.adapters.registries import FACTOR_BYTES, LLAMA, make_registry
from tests.unit.adapters.shared_support import CREDENTIALS, objects_of, s3_server
from tests.unit.adapters.support import adapted


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(data_dir: Path) -> Iterator[AdapterStore]:
    """An empty one in `data_dir` that keeps two versions of a name."""
    store = AdapterStore(data_dir, keep_versions=2)
    yield store
    store.close()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[Callable[[], str]]:
    """Answers with the address of a server that speaks S3, started when it is first asked for."""
    with ExitStack() as started:
        addresses: list[str] = []

        def endpoint() -> str:
            if not addresses:
                os.environ.update(CREDENTIALS)
                addresses.append(started.enter_context(s3_server()))
            return addresses[0]

        yield endpoint


@pytest.fixture(params=["file", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path, s3_endpoint: Callable[[], str]) -> ObjectStore:
    """An empty object storage: a directory, then a bucket's."""
    return objects_of(request.param, tmp_path, s3_endpoint)


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    return adapted(LLAMA)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters a, b, c and d, alike but for their values."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(LLAMA, AdapterSpec(target_modules=["q_proj"], seed=seed), root / name)
        for seed, name in enumerate("abcd")
    }


@pytest.fixture
def registry(store: AdapterStore, model: AdaptedModel) -> AdapterRegistry:
    return make_registry(store, model, budget=10 * FACTOR_BYTES)
