"""A safetensors header, parsed and checked before any tensor is read.

The library reads tensors; this module first makes sure that the file is what it claims to be, so that every refusal
names the tensor, and that nothing is allocated for a file whose sizes do not add up.
Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters import strict_json
from adapters.errors import InvalidSafetensors, MissingTensor, UnsupportedCheckpoint
from adapters.split_file import WEIGHTS_FILE as WEIGHTS_FILE
from adapters.split_file import file_size, open_file

METADATA_KEY = "__metadata__"
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 10_000
MAX_DIMENSIONS = 8
MAX_KEY_LENGTH = 512  # characters; a model's longest names have a hundred
_MAX_INT = 2**48  # bytes, or elements along one axis

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1,
}  # fmt: skip

# What people upload instead of safetensors, by their first bytes.
_FOREIGN_FORMATS: Mapping[bytes, str] = {
    b"PK\x03\x04": "a zip archive (a torch.save file, perhaps)",
    b"PK\x05\x06": "an empty zip archive",
    b"PK\x07\x08": "a zip archive in several parts",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"(dp": "a Python pickle",  # protocols 0 and 1 have no signature; of a dict, a list or an object they begin so
    b"(lp": "a Python pickle",
    b"}q": "a Python pickle",
    b"]q": "a Python pickle",
    b"c__": "a Python pickle",
    b"ccol": "a Python pickle",
    b"ccopy": "a Python pickle",
    b"ctorch": "a Python pickle",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\xfd7zXZ\0": "an xz file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer in place of the file (run `git lfs pull`)",
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

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor and where its bytes are, counted from the end of the header: [begin, end)."""

    spec: TensorSpec
    begin: int
    end: int


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
        what = f"no {path.name} in the adapter directory"
        if (pickled := path.with_suffix(".bin")).is_file():
            what += (
                f"; {pickled.name} is a pickle, which is not read: save the adapter anew, with safe_serialization=True"
            )
        raise MissingTensor(what, subject=path.name)
    size = file_size(path)
    with open_file(path) as file:
        return _header_bytes(file, size)


def parse_header(header: RawHeader) -> dict[str, TensorSpec]:
    """The tensors that a header declares, by key, in key order.

    Raises InvalidSafetensors for one that is malformed or disagrees with the file's size.
    """
    entries = {key: _entry(key, value) for key, value in sorted(_parse(header.json).items())}
    _check_offsets(entries.values(), header.data_bytes)
    return {key: entry.spec for key, entry in entries.items()}


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
    if start[8:9] == b"{":
        return  # a safetensors header, whose length or words may look like another format
    if start[257:262] == b"ustar":
        raise UnsupportedCheckpoint("the weights are a tar archive; send safetensors", subject=WEIGHTS_FILE)
    for magic, what in _FOREIGN_FORMATS.items():
        if start.startswith(magic):
            raise UnsupportedCheckpoint(f"the weights are {what}; send safetensors", subject=WEIGHTS_FILE)


def _parse(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise InvalidSafetensors("the header does not begin with '{'", subject=WEIGHTS_FILE)
    try:
        header = strict_json.parse(raw)
    except ValueError as error:
        raise InvalidSafetensors(f"the header is not valid JSON: {error}", subject=WEIGHTS_FILE) from error
    assert isinstance(header, dict), "it begins with a brace"
    _check_metadata(header.pop(METADATA_KEY, {}))
    if len(header) > MAX_TENSORS:
        raise InvalidSafetensors(
            f"the file declares {len(header):,} tensors; at most {MAX_TENSORS:,} are accepted",
            subject=WEIGHTS_FILE,
        )
    return header


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidSafetensors(f"the header's {METADATA_KEY} is no JSON object of strings", subject=METADATA_KEY)


def _entry(key: str, value: object) -> _Entry:
    _check_key(key)
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **rest} if not rest:
            if dtype not in DTYPE_BYTES:
                raise InvalidSafetensors(
                    f"{key} has dtype {dtype!r}; float32, bfloat16 or float16 and integers are accepted", subject=key
                )
            if len(shape) <= MAX_DIMENSIONS and all(map(_is_size, (*shape, begin, end))):
                return _Entry(TensorSpec(key, dtype, tuple(shape)), begin, end)
    raise InvalidSafetensors(f"the header's entry for {key!r} is malformed", subject=key)


def _check_key(key: str) -> None:
    """Keys go into messages and logs as they are, and are taken apart at their dots."""
    if len(key) > MAX_KEY_LENGTH:
        raise InvalidSafetensors(
            f"the name of the tensor {key[:80]!a}… has {len(key):,} characters; at most {MAX_KEY_LENGTH} are accepted",
            subject=ascii(key[:80]),
        )
    if not key.isprintable():
        raise InvalidSafetensors(f"the header names a tensor {key!a}, which cannot be printed", subject=ascii(key))
    if not all(key.split(".")):
        raise InvalidSafetensors(
            f"the header names a tensor {key!r}; between its dots there must be names", subject=ascii(key)
        )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_INT  # a bool is no int here


def _check_offsets(entries: Iterable[_Entry], data_bytes: int) -> None:
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        spec = entry.spec
        if entry.begin != position or entry.end - entry.begin != spec.nbytes:
            raise InvalidSafetensors(
                f"the offsets of {spec.key!r} do not fit its shape and dtype, or leave a gap or overlap",
                subject=spec.key,
            )
        position = entry.end
    if position != data_bytes:
        raise InvalidSafetensors(
            f"the header describes {position:,} bytes of tensors but the file holds {data_bytes:,}: copy it anew",
            subject=WEIGHTS_FILE,
        )
