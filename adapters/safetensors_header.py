"""A safetensors header, parsed and checked before any tensor is read.

The library reads tensors; this module first makes sure that the file is what it claims to be, so that every refusal
names the tensor, and that nothing is allocated for a file whose sizes do not add up.
Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import InvalidSafetensors, MissingTensor, UnsupportedCheckpoint

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 10_000
MAX_DIMENSIONS = 8

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1,
}  # fmt: skip

# What people upload instead of safetensors, by their first bytes.
_FOREIGN_FORMATS: Mapping[bytes, str] = {
    b"PK\x03\x04": "a zip archive (a torch.save file, perhaps)",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as the header declares it: its key, safetensors dtype name and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class RawHeader:
    """A header's JSON as it stands in the file, and how many bytes of tensors come after it."""

    json: bytes
    data_bytes: int


def read_header(path: Path) -> RawHeader:
    """The header of a safetensors file.

    Raises MissingTensor without the file, UnsupportedCheckpoint for another format, InvalidSafetensors for a header
    that is too large or does not fit into the file.
    """
    if not path.is_file():
        raise MissingTensor(f"no {path.name} in the adapter directory", subject=path.name)
    size = path.stat().st_size
    with path.open("rb") as file:
        return _header_bytes(file, size)


def parse_header(header: RawHeader) -> dict[str, TensorSpec]:
    """The tensors that a header declares, by key, in key order.

    Raises InvalidSafetensors for one that is malformed or disagrees with the file's size.
    """
    entries = _parse(header.json)
    specs = {key: _tensor_spec(key, entry) for key, entry in sorted(entries.items())}
    _check_offsets(entries, specs, header.data_bytes)
    return specs


def _header_bytes(file: BinaryIO, size: int) -> RawHeader:
    start = file.read(512)
    _refuse_foreign(start)
    if len(start) < 8:
        raise InvalidSafetensors("the file is shorter than a safetensors header", subject=WEIGHTS_FILE)
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES:
        raise InvalidSafetensors(
            f"the header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are accepted",
            subject=WEIGHTS_FILE,
        )
    if 8 + length > size:
        raise InvalidSafetensors("the file ends inside its header; was the upload cut short?", subject=WEIGHTS_FILE)
    file.seek(8)
    return RawHeader(file.read(length), size - 8 - length)


def _refuse_foreign(start: bytes) -> None:
    if start[257:262] == b"ustar":
        raise UnsupportedCheckpoint("the weights are a tar archive; send safetensors", subject=WEIGHTS_FILE)
    for magic, what in _FOREIGN_FORMATS.items():
        # A safetensors header's length may share the first bytes, but then byte 8 opens its JSON object.
        if start.startswith(magic) and start[8:9] != b"{":
            raise UnsupportedCheckpoint(f"the weights are {what}; send safetensors", subject=WEIGHTS_FILE)


def _parse(raw: bytes) -> dict[str, dict[str, Any]]:
    try:
        header = json.loads(raw, object_pairs_hook=_refuse_repeats)
    except (ValueError, RecursionError) as error:
        raise InvalidSafetensors(f"the header is not valid JSON: {error}", subject=WEIGHTS_FILE) from error
    if not isinstance(header, dict):
        raise InvalidSafetensors("the header is not a JSON object", subject=WEIGHTS_FILE)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise InvalidSafetensors(
            f"the file declares {len(header):,} tensors; at most {MAX_TENSORS:,} are accepted",
            subject=WEIGHTS_FILE,
        )
    return header


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values


def _tensor_spec(key: str, entry: object) -> TensorSpec:
    if not key.isprintable():  # it would go into messages and logs as it is
        raise InvalidSafetensors(f"the header names a tensor {key!a}, which cannot be printed", subject=ascii(key))
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(), int()]} if dtype in DTYPE_BYTES:
            if len(shape) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 2**48 for n in shape):
                return TensorSpec(key, dtype, tuple(shape))
    raise InvalidSafetensors(f"the header's entry for {key!r} is malformed", subject=key)


def _check_offsets(entries: dict[str, dict[str, Any]], specs: dict[str, TensorSpec], data_bytes: int) -> None:
    position = 0
    for key in sorted(entries, key=lambda key: tuple(entries[key]["data_offsets"])):
        begin, end = entries[key]["data_offsets"]
        size = specs[key].elements * DTYPE_BYTES[specs[key].dtype]
        if begin != position or end - begin != size:
            raise InvalidSafetensors(
                f"the offsets of {key!r} do not fit its shape and dtype, or leave a gap or overlap",
                subject=key,
            )
        position = end
    if position != data_bytes:
        raise InvalidSafetensors(
            f"the header describes {position:,} bytes of tensors but the file holds {data_bytes:,}",
            subject=WEIGHTS_FILE,
        )
