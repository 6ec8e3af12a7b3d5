"""Adapters damaged at random: each is decided by its seed alone."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.config import CONFIG_FILE
from adapters.safetensors_header import WEIGHTS_FILE

Mutation = Callable[[random.Random, bytes, bytes], bytes]  # (source of chance, a file, another real file) → the damaged

ODD_VALUES: Sequence[Any] = (
    None, True, 0, -1, 1, 2, 3, 4.0, 1e308, 2**31, 2**48, 2**60, 2**64, 10**400, "", "F32", "U8", "NaN", "a.b",
    "..", "\0", "\ud800", [], [1], [0, 0], ["q_proj"], {}, {"a": 1}, ".*", "(", "(?:a|a)+!", "all-linear",
    "base_model.model.x",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterFiles:
    config: bytes
    weights: bytes

    @classmethod
    def read(cls, directory: Path) -> AdapterFiles:
        return cls((directory / CONFIG_FILE).read_bytes(), (directory / WEIGHTS_FILE).read_bytes())

    def write(self, directory: Path) -> None:
        (directory / CONFIG_FILE).write_bytes(self.config)
        (directory / WEIGHTS_FILE).write_bytes(self.weights)


def mutated(seed: str, source: AdapterFiles, other: AdapterFiles) -> AdapterFiles:
    """A damaged copy of `source`, sometimes with parts of `other`; usually only one file is damaged."""
    chance = random.Random(seed)
    kind = chance.random()
    if kind < 0.02:
        return AdapterFiles(source.config, other.weights)
    config, weights = source.config, source.weights
    if kind < 0.25:
        mutation = chance.choice((*ON_BYTES, *[edit_json] * 4))
        config = mutation(chance, config, other.config)
    if kind > 0.22:
        mutation = chance.choice((*ON_BYTES, *[in_header] * 2, *[in_data] * 2, *[edit_header] * 3))
        weights = mutation(chance, weights, other.weights)
    return AdapterFiles(config, weights)


def flip_bits(chance: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8, 64))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def overwrite_run(chance: random.Random, data: bytes, other: bytes) -> bytes:
    start, length = _slice(chance, data)
    fill = chance.choice((b"\0", b"\xff", b"\x7f", b"\x80", b" ", b"9", chance.randbytes(1)))
    run = chance.choice((fill * length, chance.randbytes(length)))
    return data[:start] + run + data[start + length :]


def cut(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """The end, the beginning or something between is missing."""
    start, length = _slice(chance, data)
    return chance.choice((data[:start], data[start:], data[:start] + data[start + length :]))


def grow(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Something is there twice, or something strange is at the end or in between."""
    start, length = _slice(chance, data)
    more = chance.choice((data[start : start + length], chance.randbytes(length), b"\0" * length, b"PK\x03\x04"))
    at = chance.choice((start, start + length, len(data)))
    return data[:at] + more + data[at:]


def swap_chunks(chance: random.Random, data: bytes, other: bytes) -> bytes:
    a, b, c, d = sorted(chance.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def splice(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """The beginning of one file, or something in its middle, with bytes of another."""
    start, length = _slice(chance, other)
    at = chance.randrange(len(data))
    return chance.choice((data[:at] + other[at:], data[:at] + other[start : start + length] + data[at + length :]))


ON_BYTES: Sequence[Mutation] = (flip_bits, overwrite_run, cut, grow, swap_chunks, splice)


def in_header(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Damage to the header's length or its JSON."""
    header, rest = _split(data)
    return chance.choice(ON_BYTES)(chance, header, _split(other)[0]) + rest


def in_data(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Damage to tensors that leaves the header and the file's size as they are."""
    header, rest = _split(data)
    return header + chance.choice((flip_bits, overwrite_run, swap_chunks))(chance, rest, b"")


def edit_header(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """A header that is valid JSON and says something else."""
    header, rest = _split(data)
    changed = edit_json(chance, header[8:], _split(other)[0][8:])
    return struct.pack("<Q", len(changed)) + changed + rest


def edit_json(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """One or two entries of a JSON object changed, dropped, renamed, exchanged or taken from another."""
    values, others = json.loads(data), json.loads(other)
    for _ in range(chance.choice((1, 1, 2))):
        _edit(chance, values, others)
    return json.dumps(values).encode()


def _edit(chance: random.Random, values: dict[str, Any], others: dict[str, Any]) -> None:
    while True:  # down to some object or list in it
        inner = [value for value in _members(values) if isinstance(value, (dict, list)) and value]
        if not inner or chance.random() < 0.3:
            break
        values = chance.choice(inner)
    at = chance.choice(list(values) if isinstance(values, dict) else range(len(values)))
    match chance.randrange(6):
        case 0:
            del values[at]
        case 1:
            values[at] = chance.choice(_members(others))
        case 2 if isinstance(values, dict):
            values[chance.choice((at + ".x", at[:-1], at.replace("A", "B"), "", *others))] = values[at]
        case 3:
            to = chance.choice(list(values) if isinstance(values, dict) else range(len(values)))
            values[at], values[to] = values[to], values[at]
        case 4 if isinstance(values[at], int):
            values[at] += chance.choice((-1, 1, 7, 2**20, 2**40))
        case _:
            values[at] = chance.choice(ODD_VALUES)


def _members(values: dict[str, Any] | list[Any]) -> list[Any]:
    return list(values.values()) if isinstance(values, dict) else values


def _slice(chance: random.Random, data: bytes) -> tuple[int, int]:
    length = min(len(data), chance.choice((1, 2, 4, 8, 64, 512, 4096)))
    return chance.randrange(len(data) - length + 1), length


def _split(data: bytes) -> tuple[bytes, bytes]:
    """A file's header with its length, and its tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end], data[end:]
