"""Files that are not what they claim to be."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from adapters.errors import LONGEST_MESSAGE, CheckpointError, InvalidSafetensors, MissingTensor, UnsupportedCheckpoint
from adapters.safetensors_header import (
    MAX_HEADER_BYTES,
    MAX_KEY_LENGTH,
    MAX_TENSORS,
    WEIGHTS_FILE,
    TensorSpec,
    parse_header,
    read_header,
)
from tests.unit.adapters.support import write_raw


def specs_of(path: Path) -> dict[str, TensorSpec]:
    return parse_header(read_header(path))


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path):
    dtypes = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip
    tensors = {name: torch.zeros(2, 3, dtype=dtype) for name, dtype in dtypes.items()}
    tensors |= {"empty": torch.zeros(4, 0), "scalar": torch.zeros(())}
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    specs = specs_of(tmp_path / WEIGHTS_FILE)
    assert specs == {
        **{name: TensorSpec(name, name, (2, 3)) for name in dtypes},
        "empty": TensorSpec("empty", "F32", (4, 0)),
        "scalar": TensorSpec("scalar", "F32", ()),
    }
    assert list(specs) == sorted(specs)
    assert specs["empty"].elements == 0
    assert specs["scalar"].elements == 1


MALFORMED = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6),
    "the same bytes twice": ({"a": entry(0, 4), "b": entry(0, 4)}, 4),
    "gap": ({"a": entry(0, 4), "b": entry(5, 8)}, 8),
    "gap at the start": ({"a": entry(1, 4)}, 4),
    "bytes that no tensor has": ({"a": entry(0, 4)}, 9),
    "fewer bytes than declared": ({"a": entry(0, 4)}, 3),
    "size is not the shape's": ({"a": entry(0, 4, [5])}, 4),
    "size is not the dtype's": ({"a": entry(0, 4, [4], "F32")}, 4),
    "negative size": ({"a": entry(0, -4, [4])}, 4),
    "negative dimension": ({"a": entry(0, 4, [-2, -2])}, 4),
    "product overflows": ({"a": entry(0, 0, [2**47, 2**47, 2**47])}, 0),
    "huge dimension beside a zero": ({"a": entry(0, 0, [2**60, 0])}, 0),
    "too many dimensions": ({"a": entry(0, 1, [1] * 9)}, 1),
    "dimension a float": ({"a": entry(0, 4, [4.0])}, 4),
    "dimension a bool": ({"a": entry(0, 1, [True])}, 1),
    "unknown dtype": ({"a": entry(0, 4, dtype="X3")}, 4),
    "dtype a number": ({"a": {**entry(0, 4), "dtype": 1}}, 4),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, 4),
    "three offsets": ({"a": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, 4),
    "offsets floats": ({"a": {**entry(0, 4), "data_offsets": [0.0, 4.0]}}, 4),
    "entry null": ({"a": None}, 0),
    "entry a list": ({"a": []}, 0),
    "control characters in a key": ({"a\x1b[31m": entry(0, 4)}, 4),
    "a key of a megabyte of dots": ({"." * 10**6: entry(0, 4)}, 4),
    "a key too long": ({"a" * (MAX_KEY_LENGTH + 1): entry(0, 4)}, 4),
    "an empty key": ({"": entry(0, 4)}, 4),
    "nothing between two dots": ({"a..b": entry(0, 4)}, 4),
    "a key that ends in a dot": ({"a.": entry(0, 4)}, 4),
    "writing direction in a key": ({"a\u202eb": entry(0, 4)}, 4),
    "offsets bools": ({"a": {**entry(0, 1, [1]), "data_offsets": [False, True]}}, 1),
    "offsets negative": ({"a": entry(-4, 0)}, 0),
    "offsets in reverse": ({"a": entry(4, 0)}, 4),
    "offsets huge": ({"a": entry(2**63, 2**63 + 4)}, 4),
    "offsets beyond the file": ({"a": entry(0, 2**40, [2**40])}, 4),
    "one tensor inside another": ({"a": entry(0, 8), "b": entry(2, 4, [2])}, 8),
    "a field too many": ({"a": {**entry(0, 4), "strides": [1]}}, 4),
    "a float of another kind": ({"a": entry(0, 4, [4], "F8_E4M3")}, 4),
    "a billion billion elements": ({"a": entry(0, 4, [2**30, 2**30], "F32")}, 4),
    "NaN for a dimension": (b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 0]}}', 0),
    "1e400 for a dimension": (b'{"a": {"dtype": "U8", "shape": [1e400], "data_offsets": [0, 0]}}', 0),
    "metadata null": ({"__metadata__": None, "a": entry(0, 4)}, 4),
    "metadata a list": ({"__metadata__": [], "a": entry(0, 4)}, 4),
    "metadata of numbers": ({"__metadata__": {"format": 3}, "a": entry(0, 4)}, 4),
    "metadata a tensor": ({"__metadata__": entry(0, 4)}, 4),
    "metadata twice": (b'{"__metadata__": {}, "__metadata__": {}}', 0),
    "spaces before the header": (b"  " + json.dumps({"a": entry(0, 4)}).encode(), 4),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps({"a": entry(0, 4)}).encode(), 4),
    "UTF-16": (json.dumps({"a": entry(0, 4)}).encode("utf-16"), 4),
    "a zero byte after the header": (json.dumps({"a": entry(0, 4)}).encode() + b"\0", 4),
    "half a surrogate pair in a key": ({"a\ud800": entry(0, 4)}, 4),
    "header a list": (b"[]", 0),
    "header a string": (b'"header"', 0),
    "header empty": (b"", 0),
    "header not JSON": (b"{'a': 1}", 0),
    "header not UTF-8": (b'{"\xff": 1}', 0),
    "header nested without end": (b"[" * 100_000, 0),
    "key twice": (b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), 4),
    "field twice": (b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}', 4),
    "number of 5000 digits": (b'{"a": ' + b"1" * 5000 + b"}", 0),
    "too many tensors": ({f"{n}": entry(0, 0) for n in range(MAX_TENSORS + 1)}, 0),
}


@pytest.mark.parametrize(("header", "data_bytes"), MALFORMED.values(), ids=MALFORMED)
def test_refuses_a_malformed_header(header: dict[str, Any] | bytes, data_bytes: int, tmp_path: Path):
    path = write_raw(header, b"\0" * data_bytes, tmp_path) / WEIGHTS_FILE
    with pytest.raises(InvalidSafetensors) as refusal:
        specs_of(path)
    assert refusal.value.code == "invalid_safetensors"
    f"{refusal.value.message}{refusal.value.subject}".encode()  # can be sent
    assert len(refusal.value.message) <= LONGEST_MESSAGE


def test_a_malformed_entry_is_named(tmp_path: Path):
    path = write_raw({"fine": entry(0, 4), "broken": entry(4, 8, [5])}, b"\0" * 8, tmp_path) / WEIGHTS_FILE
    with pytest.raises(InvalidSafetensors) as refusal:
        specs_of(path)
    assert refusal.value.subject == "broken"


NAMING = {
    "a key twice": (b'{"w.b": {}, "w.a": {}, "w.b": {}}', "'w.b'"),
    "a dtype": ({"w.a": entry(0, 4, [4], "F8_E4M3")}, "w.a has dtype 'F8_E4M3'"),
    "metadata": ({"__metadata__": {"format": 3}}, "__metadata__"),
    "a long key": ({"w" * 1000: entry(0, 4)}, "wwww"),
}


@pytest.mark.parametrize(("header", "named"), NAMING.values(), ids=NAMING)
def test_says_what_is_at_fault(header: dict[str, Any] | bytes, named: str, tmp_path: Path):
    with pytest.raises(InvalidSafetensors) as refusal:
        specs_of(write_raw(header, b"", tmp_path) / WEIGHTS_FILE)
    assert named in refusal.value.message


def test_a_header_is_read_in_memory_of_its_own_size(tmp_path: Path):
    """Whatever its JSON holds: objects take the most memory for their bytes."""
    path = write_raw(b'{"a":[' + b"{}," * 340_000 + b"{}]}", b"", tmp_path) / WEIGHTS_FILE
    tracemalloc.start()
    try:
        with pytest.raises(InvalidSafetensors):
            specs_of(path)
        assert tracemalloc.get_traced_memory()[1] < 64 * MAX_HEADER_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [0, 3, 7, 8, 12, 40])
def test_refuses_a_truncated_file(length: int, tmp_path: Path):
    path = write_raw({"a": entry(0, 64)}, b"\0" * 64, tmp_path) / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InvalidSafetensors):
        specs_of(path)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**40, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_before_it_is_read(length: int, tmp_path: Path):
    (tmp_path / WEIGHTS_FILE).write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(InvalidSafetensors, match="header claims"):
        specs_of(tmp_path / WEIGHTS_FILE)


def zip_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x" * 600)
    return buffer.getvalue()


def tar_archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("adapter_model.safetensors"))
    return buffer.getvalue()


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    return buffer.getvalue()


FOREIGN = {
    "zip": zip_archive(),
    "torch": torch_file(),
    "tar": tar_archive(),
    "gzip": gzip.compress(b"x" * 600),
    "GGUF": b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\0" * 64,
    "empty zip": b"PK\x05\x06" + b"\0" * 18,
    "xz": lzma.compress(b"x" * 600),
    "bzip2": bz2.compress(b"x" * 600),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    **{f"pickle {n}": pickle.dumps({"a": [1.0] * 30}, protocol=n) for n in range(6)},
    **{f"pickle {n} of a list": pickle.dumps(["a", 1], protocol=n) for n in range(6)},
    **{f"pickle {n} of an object": pickle.dumps(OrderedDict(a=1), protocol=n) for n in range(6)},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_another_format_is_unsupported_and_nothing_is_unpickled(content: bytes, tmp_path: Path):
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint, match="send safetensors") as refusal:
        specs_of(tmp_path / WEIGHTS_FILE)
    assert refusal.value.code == "unsupported_checkpoint"


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x8B1F])
def test_a_header_whose_length_looks_like_another_format_is_read(length: int, tmp_path: Path):
    text = json.dumps({"a": entry(0, 4)}).encode().ljust(length)
    assert list(specs_of(write_raw(text, b"\0" * 4, tmp_path) / WEIGHTS_FILE)) == ["a"]


def test_a_missing_file_is_a_missing_tensor(tmp_path: Path):
    with pytest.raises(MissingTensor):
        specs_of(tmp_path / WEIGHTS_FILE)
    (tmp_path / WEIGHTS_FILE).mkdir()
    with pytest.raises(MissingTensor):
        specs_of(tmp_path / WEIGHTS_FILE)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(max_size=200), at=st.integers(0, 220), cut=st.booleans())
def test_any_damage_is_refused_or_harmless(garbage: bytes, at: int, cut: bool, tmp_path: Path):
    header = {"a": entry(0, 8, [2], "F32"), "b": entry(8, 12, [2, 2])}
    path = write_raw(header, b"\1" * 12, tmp_path) / WEIGHTS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + garbage + (b"" if cut else whole[at + len(garbage) :]))
    try:
        specs = specs_of(path)
    except CheckpointError:
        return
    sizes = {"F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}
    assert sum(spec.elements * sizes.get(spec.dtype, 1) for spec in specs.values()) <= path.stat().st_size
