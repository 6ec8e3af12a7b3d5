"""How adapters stand in memory, and what the registry has counted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class AdapterState(StrEnum):
    """STORED: on disk. LOADING: being read and composed. READY: its factors are in memory. FAILED: cannot be served."""

    STORED = "STORED"
    LOADING = "LOADING"
    READY = "READY"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """How one version stands. `reason` says why it FAILED; `last_used` is a Unix time, None if never.

    `resident_bytes` are what it would take alone: with its bank, whoever else has that too.
    """

    state: AdapterState
    reason: str | None
    resident_bytes: int
    pins: int
    last_used: float | None


@dataclass(frozen=True, slots=True)
class RegistryStats:
    """Counts since start: pins that found factors in memory (`hits`) or did not (`misses`), and what that led to.

    `evictions` are of factors, for want of room; `composes` took `compose_s` seconds together. Beside them the versions
    that are at this moment being loaded, that have their factors in memory, and that cannot be served.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    composes: int = 0
    compose_s: float = 0.0
    loading: int = 0
    ready: int = 0
    failed: int = 0
