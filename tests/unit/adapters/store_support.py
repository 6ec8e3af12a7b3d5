"""What the tests of the adapter store share."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.split_file import BANK_KEY, open_file
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


def weights_with(bank: bytes, own: bytes = b"own") -> bytes:
    """A weights file in which a bank stands between other tensors."""
    ends = [len(own), len(own) + len(bank), 2 * len(own) + len(bank)]
    entries = {
        key: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for key, begin, end in zip(("a", BANK_KEY, "z"), (0, *ends), ends, strict=False)
    }
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + own + bank + own


def uploaded(path: Path) -> bytes:
    """An adapter's file as it was uploaded, wherever it is stored."""
    with open_file(path) as file:
        return file.read()


def blobs(data_dir: Path) -> set[str]:
    return {f"sha256:{path.name}" for path in (data_dir / "blobs" / "sha256").iterdir()}


def banks(data_dir: Path) -> dict[str, int]:
    """The stored banks by their digests' hex digits, and how many adapters link to each."""
    return {path.name: path.stat().st_nlink - 1 for path in (data_dir / "banks" / "sha256").iterdir()}


def assert_consistent(store: AdapterStore, data_dir: Path) -> None:
    """Whatever is listed is whole, and nothing else is kept."""
    listed = {version.digest for _, _, version in store.all_versions()}
    assert blobs(data_dir) == listed
    for digest in listed:
        assert digest_of(store.path(digest)) == digest
    assert all(adapters > 0 for adapters in banks(data_dir).values())
    assert list((data_dir / "tmp").iterdir()) == []


def flip_a_bit(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
