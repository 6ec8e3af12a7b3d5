"""What the tests of the adapter store share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.store import AdapterRecord, AdapterStore, digest_of

SHARED = ""


def publish(
    store: AdapterStore,
    name: str,
    weights: bytes = b"weights",
    *,
    tenant: str = SHARED,
    info: Mapping[str, Any] | None = None,
) -> AdapterRecord:
    """A new adapter, or a new version of one."""
    with store.staging() as staged:
        (staged / "adapter_config.json").write_text("{}")
        (staged / "adapter_model.safetensors").write_bytes(weights)
        return store.publish(tenant, name, staged, info or {}, replace=True)


def blobs(data_dir: Path) -> set[str]:
    return {f"sha256:{path.name}" for path in (data_dir / "blobs" / "sha256").iterdir()}


def assert_consistent(store: AdapterStore, data_dir: Path) -> None:
    """Whatever is listed is whole, and nothing else is kept."""
    listed = {version.digest for _, _, version in store.all_versions()}
    assert blobs(data_dir) == listed
    for digest in listed:
        assert digest_of(store.path(digest)) == digest
    assert list((data_dir / "tmp").iterdir()) == []


def flip_a_bit(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
