"""Weights whose bank is in a file of its own are read as what they were; what is damaged never passes for that."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from adapters.split_file import BANK_FILE, WEIGHTS_FILE, bank_range, file_size, is_split, open_file
from tests.unit.adapters.store_support import uploaded, weights_with

BANK = bytes(range(256)) * 40
WHOLE = weights_with(BANK, own=b"0123456789" * 1000)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Weights without their bank, which is beside them."""
    at = WHOLE.index(BANK)
    (tmp_path / BANK_FILE).write_bytes(BANK)
    (tmp_path / WEIGHTS_FILE).write_bytes(WHOLE[:at] + WHOLE[at + len(BANK) :])
    return tmp_path / WEIGHTS_FILE


def test_it_reads_as_what_it_was(split: Path) -> None:
    assert uploaded(split) == WHOLE
    assert (file_size(split), is_split(split)) == (len(WHOLE), True)


@pytest.mark.parametrize("length", [1, 7, 4096, 9999, 1 << 20])
def test_in_pieces(split: Path, length: int) -> None:
    with open_file(split) as file:
        assert b"".join(iter(lambda: file.read(length), b"")) == WHOLE


def test_at_any_place(split: Path) -> None:
    with open_file(split) as file:
        for at in range(0, len(WHOLE), 777):
            assert file.seek(at) == file.tell() == at
            assert file.read(500) == WHOLE[at : at + 500]
        assert file.seek(-3, os.SEEK_END) == len(WHOLE) - 3
        assert file.read() == WHOLE[-3:]
        file.seek(1000)
        file.seek(10, os.SEEK_CUR)
        assert file.read(5) == WHOLE[1010:1015]
        assert file.seek(len(WHOLE) + 5) > len(WHOLE)
        assert file.read() == b""


def test_what_is_left_is_read_without_a_second_copy(split: Path) -> None:
    with open_file(split) as file:
        file.read(100)
        assert file.read() == WHOLE[100:]


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "adapter_config.json"])
def test_a_file_without_a_bank_beside_it_is_itself(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(WHOLE)
    assert uploaded(tmp_path / name) == WHOLE
    assert (file_size(tmp_path / name), is_split(tmp_path / name)) == (len(WHOLE), False)


def test_other_files_have_no_bank(split: Path) -> None:
    config = split.with_name("adapter_config.json")
    config.write_bytes(WHOLE)
    assert uploaded(config) == WHOLE


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_only_a_plain_file_is_a_bank(split: Path, kind: str) -> None:
    kept, bank = split.read_bytes(), split.with_name(BANK_FILE)
    bank.rename(split.with_name("elsewhere"))
    if kind == "link":
        bank.symlink_to("elsewhere")
    elif kind == "directory":
        bank.mkdir()
    else:
        os.mkfifo(bank)
    assert (uploaded(split), is_split(split)) == (kept, False)


def test_links_to_weights_are_followed_on_request_alone(split: Path, tmp_path: Path) -> None:
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / WEIGHTS_FILE).symlink_to(split)
    assert uploaded(folder / WEIGHTS_FILE) == split.read_bytes()
    with pytest.raises(OSError, match="symbolic"):
        open_file(folder / WEIGHTS_FILE, follow_links=False)


@pytest.mark.parametrize("damage", ["header", "length", "no header", "bank cut", "bank longer", "weights cut"])
def test_what_does_not_fit_is_read_as_something_else(split: Path, damage: str) -> None:
    kept, bank = bytearray(split.read_bytes()), bytearray(BANK)
    if damage == "header":
        kept[kept.index(b"vblora")] ^= 1
    elif damage == "length":
        kept[:8] = struct.pack("<Q", 1 << 40)
    elif damage == "no header":
        kept = kept[:4]
    elif damage == "bank cut":
        bank.pop()
    elif damage == "bank longer":
        bank += b"x"
    else:
        kept = kept[:200]
    split.write_bytes(kept)
    split.with_name(BANK_FILE).write_bytes(bank)
    assert uploaded(split) != WHOLE
    assert len(uploaded(split)) == file_size(split) == len(kept) + len(bank)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b'{"base_model.vblora_vector_bank":{"dtype":"F32","shape":[2,2],"data_offsets":[4,20]}}', (4, 20)),
        (b'{"base_model.vblora_vector_bank": {"data_offsets": [ 4 , 20 ], "dtype": "F32"}}', (4, 20)),
        (b'{"a":{"data_offsets":[0,4]},"base_model.vblora_vector_bank":{"data_offsets":[4,20]}}', (4, 20)),
        (b'{"base_model.vblora_vector_bank":{},"a":{"data_offsets":[0,4]}}', None),
        (b'{"__metadata__":{"x":"\\"base_model.vblora_vector_bank\\":{\\"data_offsets\\":[0,1]}"}}', None),
        (b'{"base_model.vblora_vector_bank":{"data_offsets":[-4,20]}}', None),
        (b"", None),
    ],
)
def test_the_header_says_where_a_bank_is(tmp_path: Path, header: bytes, expected: tuple[int, int] | None) -> None:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with path.open("rb") as file:
        found = bank_range(file.fileno())
    assert found == (expected and (expected[0] + 8 + len(header), expected[1] + 8 + len(header)))
