"""An adapter store of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.store import AdapterStore


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(data_dir: Path) -> Iterator[AdapterStore]:
    """An empty one in `data_dir` that keeps two versions of a name."""
    store = AdapterStore(data_dir, keep_versions=2)
    yield store
    store.close()
