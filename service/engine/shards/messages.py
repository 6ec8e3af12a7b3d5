"""What the leader has the followers do, and what they answer. Sent over pipes between a process and its children."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from adapters.lora import ServedCheckpoint


@dataclass(frozen=True, slots=True)
class Hold:
    """An adapter to compose a part of, and to keep until it is dropped."""

    digest: str
    checkpoint: ServedCheckpoint


@dataclass(frozen=True, slots=True)
class Drop:
    """Adapters that are not needed any more."""

    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Add:
    rows: int


@dataclass(frozen=True, slots=True)
class Keep:
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mix:
    """The low-rank part of a forward: `weights` [rows][adapters]. `stacked` keep their place in the stack."""

    digests: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    stacked: frozenset[str]


@dataclass(frozen=True, slots=True)
class Extend:
    rows: tuple[int, ...]
    tokens: Sequence[Sequence[int]]
    mix: Mix | None
    every_position: bool


@dataclass(frozen=True, slots=True)
class Read:
    """A run of a row's keys and values, to be kept under a number."""

    number: int
    row: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Write:
    """Appends what was read under these numbers, one after the other, to a row."""

    row: int
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """Keys and values that were read and are not needed any more."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Join:
    """Everyone has loaded: the group of processes is to be formed."""


@dataclass(frozen=True, slots=True)
class Choose:
    """Everyone is to find out, together, which runner is right for the model."""

    kv_memory: int
    max_context: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a follower found: the key-value backend, and whether rows may be batched."""

    kv_backend: str
    batches: bool


@dataclass(frozen=True, slots=True)
class Reserve:
    """Memory to be reserved for so many rows of up to `longest` tokens."""

    rows: int
    longest: int


@dataclass(frozen=True, slots=True)
class Done:
    """A follower's answer: what it was asked for last is done; or it failed, and nothing has happened."""

    failure: str | None = None


def send(connection: Connection, message: object) -> None:
    """Tensors go as bytes: what PyTorch makes of a pipe's own pickling shares memory by open files."""
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """The next message. Raises EOFError once the other end is gone."""
    return pickle.loads(connection.recv_bytes())
