"""The adapters that are live on one base model: taken in, loaded when first needed, pinned while in use, evicted.

The store keeps files and names; the registry keeps what running requests need. An adapter's compact tensors stay in
memory from its first use, with one bank for all that have equal ones; its factors are composed when needed and evicted,
least recently used first, when they exceed the budget.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapters.binding import BaseIdentity, blend_origin
from adapters.blend import weighted_sum
from adapters.composing import composed
from adapters.errors import (
    AdapterError,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnavailable,
    CheckpointError,
    StoreError,
)
from adapters.factors import AdapterFactors
from adapters.heads import ClassifierHead
from adapters.intake import AdapterIntake
from adapters.layers import AdaptedModel
from adapters.lora import ServedCheckpoint
from adapters.reading import AnyLayout, as_served, describe
from adapters.shared_banks import SharedBanks, bytes_together
from adapters.status import AdapterState, AdapterStatus, RegistryStats
from adapters.store import AdapterRecord, Store

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Live:
    """One digest's state in memory. Written under the registry's lock."""

    compact: ServedCheckpoint | None = None
    factors: AdapterFactors | None = None
    loading: bool = False
    failure: AdapterError | None = None
    pins: int = 0
    last_used: float | None = None
    deleted: bool = False  # no name refers to it any more: forgotten with its last pin


class AdapterRegistry:
    """Registers adapters on one base model and hands out their factors.

    Every method may be called from any thread; `register` and `pin` read files and compose, and `forget_deleted` asks
    the store: keep them off event loops. The others wait for no file: the lock is never held while the store is asked,
    whose own lock is held while a disk is written.
    """

    def __init__(
        self,
        store: Store,
        model: AdaptedModel,
        identity: BaseIdentity,
        *,
        factor_budget: int,
        device: torch.device,
    ) -> None:
        self._store = store
        self._model = model
        self._intake = AdapterIntake(store, model, identity)
        self._budget = factor_budget
        self._device = device
        self._banks = SharedBanks(device)
        self._live: OrderedDict[str, _Live] = OrderedDict()  # least recently used first
        self._compact_bytes: int | None = None  # of all of them; None: not added up since one changed
        self._changed = threading.Condition()
        self._hits = self._misses = self._evictions = self._composes = 0
        self._compose_s = 0.0

    @property
    def store(self) -> Store:
        return self._store

    @property
    def layouts(self) -> list[AnyLayout]:
        """The layouts of adapters seen so far, each once; of many, the last."""
        return self._intake.layouts

    @property
    def head(self) -> ClassifierHead | None:
        """The classification head of the base model, if it is a classifier."""
        return self._model.head

    def check_stored(self) -> int:
        """Checks at start that every stored version has its files and binds to the base; returns how many do not.

        Those are FAILED, with the reason; the others are served. Every file is read, to hold it against its digest;
        but none of a store whose files are elsewhere: its adapters are checked when they are first used.
        """
        if not self._store.checked_at_start:
            return 0
        failures = 0
        for tenant, name, version in self._store.all_versions():
            if (error := self._intake.fault_of(version)) is not None:
                failures += 1
                self._fail(version.digest, error)
                log.warning("adapter %r (tenant %r, %s): %s", name, tenant, version.digest, error.message)
        return failures

    def register(
        self,
        tenant: str,
        name: str,
        staged: Path,
        *,
        replace: bool = False,
        allow_base_mismatch: bool = False,
        provenance: Mapping[str, Any] | None = None,
    ) -> AdapterRecord:
        """Takes a staged adapter directory in: reads it strictly, binds it to the base, publishes it under `name`.

        `provenance` is kept in the record's info: what is known of where the adapter comes from.

        Raises CheckpointError for an adapter that cannot be served here, AdapterExists, InvalidName or StorageFull.
        """
        layout, warnings = self._intake.staged_layout(staged, allow_base_mismatch=allow_base_mismatch)
        self._check_size(layout)  # before a tensor is read
        checkpoint = self._intake.staged(staged)
        info = {**describe(checkpoint, warnings), "base_mismatch_allowed": allow_base_mismatch, **(provenance or {})}
        compact = self._banks.shared(as_served(checkpoint))
        del checkpoint  # and its own copy of a bank that others have
        earlier = self._digests(tenant, name)
        record = self._store.publish(tenant, name, staged, info, replace=replace)
        with self._changed:
            live = self._live.setdefault(record.digest, _Live())
            live.compact, live.failure, live.deleted = compact, None, False
            self._compact_bytes = None
        # Publishing prunes the oldest versions, and this one may have been deleted meanwhile.
        self.forget_deleted([*earlier, record.digest])
        return record

    def compact(self, digest: str) -> ServedCheckpoint:
        """One version as it is stored, compact if it is VB-LoRA. Reads files if need be: keep it off event loops.

        Raises AdapterNotFound, AdapterUnavailable or CheckpointError.
        """
        with self._changed:
            live = self._live.get(digest)
            if live is not None and live.failure is not None:
                raise AdapterUnavailable(f"the adapter cannot be served: {live.failure.message}", subject=digest)
            if live is not None and live.compact is not None:
                return live.compact
        return self._read(digest)

    def blend(self, members: Sequence[tuple[str, float]]) -> ServedCheckpoint:
        """The weighted sum of versions, by digest, as a new adapter. Raises what `compact` and `weighted_sum` do."""
        read = [(self.compact(digest), weight) for digest, weight in members]
        return weighted_sum(read, partial(blend_origin, self._model, [checkpoint.extras for checkpoint, _ in read]))

    def pin(self, digest: str) -> AdapterFactors:
        """The factors of one version, in memory until `unpin`. Loads and composes them if need be.

        Raises AdapterNotFound (deleted meanwhile), AdapterUnavailable (FAILED), AdapterTooLarge, or CheckpointError.
        """
        with self._changed:
            live = self._live.setdefault(digest, _Live())
            self._live.move_to_end(digest)
            live.pins += 1
            live.last_used = time.time()
            if live.factors is not None:
                self._hits += 1
            else:
                self._misses += 1
            while live.loading:
                self._changed.wait()
            if live.factors is not None:
                return live.factors
            live.loading = live.failure is None
            failure = live.failure
        if failure is not None:
            self.unpin(digest)
            raise AdapterUnavailable(f"the adapter cannot be served: {failure.message}", subject=digest)
        return self._load(digest, live)

    def pin_loaded(self, digest: str) -> AdapterFactors | None:
        """Like `pin`, of a version whose factors are in memory; None of any other. Never waits for a load."""
        with self._changed:
            live = self._live.get(digest)
            if live is None or live.factors is None:
                return None
            self._live.move_to_end(digest)
            live.pins += 1
            live.last_used = time.time()
            self._hits += 1
            return live.factors

    def has_room_for(self, digests: Collection[str]) -> bool:
        """Whether pinning these now keeps what is pinned within the budget. With nothing else pinned, always."""
        with self._changed:
            pinned = {digest: live for digest, live in self._live.items() if live.pins}
            needed = sum(self._size_of(digest) for digest in set(digests) - pinned.keys())
            taken = sum(self._size_of(digest) for digest in pinned)
            return not pinned or taken + needed <= self._budget

    def _size_of(self, digest: str) -> int:
        """What the factors of a version take, or will take; 0 while it has not been read yet."""
        live = self._live.get(digest)
        if live is None or live.compact is None:
            return 0
        layout = live.compact.layout
        factors = live.factors.nbytes if live.factors is not None else _most_bytes(layout)
        return factors + self._banks.most_copied(layout)

    def unpin(self, digest: str) -> None:
        """Gives a pin back. Factors that nobody pins may be evicted from then on."""
        with self._changed:
            live = self._live[digest]
            assert live.pins > 0
            live.pins -= 1
            self._evict()
            if live.pins == 0 and live.deleted:
                self._forget(digest)

    def _forget(self, digest: str) -> None:
        """Under the lock."""
        del self._live[digest]
        self._compact_bytes = None

    def _is_stored(self, digest: str) -> bool:
        try:
            return self._store.digest_in_use(digest)
        except StoreError:
            return True  # what a failing disk does not tell is kept

    def forget_deleted(self, digests: Collection[str]) -> None:
        """Drops from memory what no name refers to any more: now, or with the last pin of a request that holds it."""
        deleted = [digest for digest in digests if not self._is_stored(digest)]
        with self._changed:
            for digest in deleted:
                live = self._live.get(digest)
                if live is not None:
                    live.deleted = True
                    if live.pins == 0:
                        self._forget(digest)

    def note_changes(self, digests: Collection[str]) -> None:
        """What others have published or deleted: the deleted is forgotten, and what was refused is tried again."""
        with self._changed:
            for digest in digests:
                live = self._live.get(digest)
                if live is not None and not live.loading:
                    live.failure = None
        self.forget_deleted(digests)

    def status(self, digest: str) -> AdapterStatus:
        with self._changed:
            live = self._live.get(digest) or _Live()
            resident = (live.compact.nbytes if live.compact else 0) + (live.factors.nbytes if live.factors else 0)
            reason = live.failure.message if live.failure else None
            return AdapterStatus(_state(live), reason, resident, live.pins, live.last_used)

    def resident_bytes(self) -> tuple[int, int]:
        """Bytes in memory of (compact tensors, composed factors). A bank that adapters share counts once in either."""
        with self._changed:
            if self._compact_bytes is None:
                self._compact_bytes = bytes_together(live.compact for live in self._live.values() if live.compact)
            return self._compact_bytes, self._factor_bytes()

    def stats(self) -> RegistryStats:
        with self._changed:
            states = Counter(map(_state, self._live.values()))
            return RegistryStats(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                composes=self._composes,
                compose_s=self._compose_s,
                loading=states[AdapterState.LOADING],
                ready=states[AdapterState.READY],
                failed=states[AdapterState.FAILED],
            )

    def _digests(self, tenant: str, name: str) -> list[str]:
        try:
            return [version.digest for version in self._store.get(tenant, name).versions]
        except AdapterNotFound:
            return []

    def _load(self, digest: str, live: _Live) -> AdapterFactors:
        """Composes the factors outside the lock; whoever else wants them waits for `loading` to end."""
        try:
            compact = live.compact or self._read(digest)
            began = time.perf_counter()
            factors = self._compose(digest, compact)
            seconds = time.perf_counter() - began
        except BaseException as error:
            with self._changed:
                live.loading = False
                mended = live.compact is not None  # by an upload meanwhile
                if isinstance(error, (CheckpointError, AdapterUnavailable)) and not mended:
                    live.failure = error  # any other may pass: the next pin tries again
                live.deleted = live.deleted or (isinstance(error, AdapterNotFound) and not mended)
                self._changed.notify_all()
            self.unpin(digest)
            raise
        with self._changed:
            if live.compact is not compact:
                self._compact_bytes = None
            live.compact, live.factors, live.loading = compact, factors, False
            self._composes += 1
            self._compose_s += seconds
            self._evict()
            self._changed.notify_all()
        return factors

    def _read(self, digest: str) -> ServedCheckpoint:
        return self._banks.shared(as_served(self._intake.stored(digest)))

    def _compose(self, digest: str, compact: ServedCheckpoint) -> AdapterFactors:
        self._check_size(compact.layout)
        return composed(digest, compact, self._model, self._banks, self._device)

    def _check_size(self, layout: AnyLayout) -> None:
        size = _most_bytes(layout) + self._banks.most_copied(layout)
        if size > self._budget:
            raise AdapterTooLarge(
                f"the adapter takes {size:,} bytes when it is used, but adapters may take {self._budget:,} in all; "
                "raise --adapter-memory"
            )

    def _factor_bytes(self) -> int:
        factors = sum(live.factors.nbytes for live in self._live.values() if live.factors)
        return factors + self._banks.copied_bytes()

    def _evict(self) -> None:
        """Drops the factors of unpinned adapters, least recently used first, until the rest fits the budget."""
        excess = self._factor_bytes() - self._budget
        for live in self._live.values():
            if excess <= 0:
                return
            if live.pins == 0 and live.factors is not None:
                before = live.factors.nbytes + self._banks.copied_bytes()
                live.factors = None
                excess -= before - self._banks.copied_bytes()  # the copy of a bank goes with its last factors
                self._evictions += 1

    def _fail(self, digest: str, error: AdapterError) -> None:
        with self._changed:
            self._live.setdefault(digest, _Live()).failure = error


def _most_bytes(layout: AnyLayout) -> int:
    """What an adapter takes at most when it is composed: its factors in float32, and the parameters it replaces."""
    return 4 * layout.parameters().lora_params + sum(spec.nbytes for spec in layout.extras)


def _state(live: _Live) -> AdapterState:
    if live.failure is not None:
        return AdapterState.FAILED
    if live.loading:
        return AdapterState.LOADING
    return AdapterState.READY if live.factors is not None else AdapterState.STORED
