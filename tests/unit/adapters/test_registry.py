"""What is live: composed once, pinned while in use, evicted by age, and forgotten when it is deleted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters import intake as intake_module
from adapters.checkpoint import TopKCheckpoint
from adapters.errors import (
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnavailable,
)
from adapters.factors import AdapterFactors
from adapters.layers import AdaptedModel
from adapters.registry import AdapterRegistry
from adapters.status import AdapterState, RegistryStats
from adapters.store import AdapterRecord, AdapterStore
from tests.factories import AdapterSpec, make_adapter
from tests.unit.adapters.registries import (
    FACTOR_BYTES,
    LLAMA,
    delete,
    digests,
    flip_a_bit,
    make_registry,
    register,
    state,
)
from tests.unit.adapters.support import factors

WAIT_S = 30


class TestPin:
    def test_of_what_is_in_memory_waits_for_no_load(self, registry: AdapterRegistry, written: dict[str, Path]):
        digest = register(registry, written["a"]).digest
        assert registry.pin_loaded(digest) is None
        assert registry.status(digest).pins == 0
        factors = registry.pin(digest)
        registry.unpin(digest)
        assert registry.pin_loaded(digest) is factors
        assert registry.status(digest).pins == 1
        registry.unpin(digest)

    def test_hands_out_the_adapters_factors(self, registry: AdapterRegistry, written: dict[str, Path]):
        digest = register(registry, written["a"]).digest
        pinned, expected = registry.pin(digest), factors(written["a"])
        assert pinned.digest == digest
        assert pinned.layers.keys() == expected.layers.keys()
        for name, layer in expected.layers.items():
            torch.testing.assert_close(pinned.layers[name].a, layer.a)
            torch.testing.assert_close(pinned.layers[name].b_t, layer.b_t)
            assert pinned.layers[name].b_t.is_contiguous()

    def test_factors_hold_no_more_memory_than_they_say(self, registry: AdapterRegistry, tmp_path: Path):
        spec = AdapterSpec(target_modules="all-linear", r=1)
        pinned = registry.pin(register(registry, make_adapter(LLAMA, spec, tmp_path / "all")).digest)
        tensors = [tensor for layer in pinned.layers.values() for tensor in (layer.a, layer.b_t)]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert sum(held.values()) == pinned.nbytes

    def test_states_and_pins(self, registry: AdapterRegistry, written: dict[str, Path]):
        digest = register(registry, written["a"]).digest
        assert registry.status(digest).last_used is None
        first = registry.pin(digest)
        assert registry.pin(digest) is first
        status = registry.status(digest)
        assert (status.state, status.pins, status.reason) == (AdapterState.READY, 2, None)
        assert status.last_used is not None
        registry.unpin(digest)
        registry.unpin(digest)
        assert (registry.status(digest).pins, state(registry, digest)) == (0, AdapterState.READY)
        with pytest.raises(AssertionError):
            registry.unpin(digest)

    def test_an_unknown_digest(self, registry: AdapterRegistry):
        unknown = "sha256:" + "0" * 64
        for _ in range(2):
            with pytest.raises(AdapterNotFound):
                registry.pin(unknown)
        assert registry.status(unknown).pins == 0
        assert state(registry, unknown) is AdapterState.STORED

    def test_after_a_restart_it_is_read_from_disk(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path]
    ):
        digest = register(make_registry(store, model, FACTOR_BYTES), written["a"]).digest
        again = make_registry(store, model, FACTOR_BYTES)
        assert again.check_stored() == 0
        assert again.resident_bytes() == (0, 0)
        torch.testing.assert_close(
            again.pin(digest).layers["model.layers.0.self_attn.q_proj"].a,
            factors(written["a"]).layers["model.layers.0.self_attn.q_proj"].a,
        )


class TestEviction:
    def registry(self, store: AdapterStore, model: AdaptedModel, adapters: int) -> AdapterRegistry:
        return make_registry(store, model, budget=adapters * FACTOR_BYTES)

    def ready(self, registry: AdapterRegistry, digests: dict[str, str]) -> str:
        return "".join(name for name, digest in digests.items() if state(registry, digest) is AdapterState.READY)

    def use(self, registry: AdapterRegistry, digest: str) -> None:
        registry.pin(digest)
        registry.unpin(digest)

    def test_least_recently_used_goes_first(self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path]):
        registry = self.registry(store, model, adapters=2)
        known = digests(registry, written)
        for name, left in [("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("d", "cd"), ("c", "cd"), ("a", "ac")]:
            self.use(registry, known[name])
            assert self.ready(registry, known) == left
            assert registry.resident_bytes()[1] <= 2 * FACTOR_BYTES

    def test_what_is_evicted_is_composed_again(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path]
    ):
        registry = self.registry(store, model, adapters=1)
        known = digests(registry, written)
        first = registry.pin(known["a"])
        registry.unpin(known["a"])
        self.use(registry, known["b"])
        again = registry.pin(known["a"])
        assert again is not first
        for name, layer in first.layers.items():
            assert torch.equal(again.layers[name].a, layer.a)

    def test_pins_are_never_evicted(self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path]):
        registry = self.registry(store, model, adapters=1)
        known = digests(registry, written)
        pinned = {name: registry.pin(known[name]) for name in "abc"}
        assert self.ready(registry, known) == "abc"
        self.use(registry, known["d"])
        assert self.ready(registry, known) == "abc", "the only one without a pin went"
        for name in "ab":
            registry.unpin(known[name])
        assert self.ready(registry, known) == "c"
        assert registry.pin(known["c"]) is pinned["c"]

    def test_what_pins_found_is_counted(self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path]):
        registry = self.registry(store, model, adapters=1)
        known = digests(registry, written)
        assert registry.stats() == RegistryStats()
        assert registry.pin_loaded(known["a"]) is None
        assert registry.stats() == RegistryStats(), "not pinned: nothing to count"
        self.use(registry, known["a"])
        composed = registry.stats()
        assert composed.compose_s > 0
        assert replace(composed, compose_s=0.0) == RegistryStats(misses=1, composes=1, ready=1)
        self.use(registry, known["a"])
        assert registry.pin_loaded(known["a"]) is not None
        registry.unpin(known["a"])
        assert registry.stats() == replace(composed, hits=2)
        self.use(registry, known["b"])
        counted = replace(registry.stats(), compose_s=0.0)
        assert counted == RegistryStats(hits=2, misses=2, evictions=1, composes=2, ready=1)

    def test_one_that_is_too_large_is_refused_and_not_failed(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path]
    ):
        generous = make_registry(store, model, budget=FACTOR_BYTES)
        digest = register(generous, written["a"]).digest
        registry = make_registry(store, model, budget=FACTOR_BYTES - 1)
        with pytest.raises(AdapterTooLarge) as refusal:
            registry.pin(digest)
        assert f"{FACTOR_BYTES:,}" in refusal.value.message
        with pytest.raises(AdapterTooLarge):
            register(registry, written["b"])
        assert registry.store.count("") == 1
        assert state(registry, digest) is AdapterState.STORED
        assert registry.status(digest).pins == 0


class TestDeletion:
    def test_forgotten_at_once_when_nobody_holds_it(self, registry: AdapterRegistry, written: dict[str, Path]):
        digest = register(registry, written["a"]).digest
        registry.pin(digest)
        registry.unpin(digest)
        delete(registry, "a")
        assert registry.resident_bytes() == (0, 0)
        with pytest.raises(AdapterNotFound):
            registry.pin(digest)

    def test_stays_for_those_who_hold_it(self, registry: AdapterRegistry, written: dict[str, Path]):
        digest = register(registry, written["a"]).digest
        pinned = registry.pin(digest)
        delete(registry, "a")
        assert registry.pin(digest) is pinned
        registry.unpin(digest)
        assert registry.resident_bytes()[1] == FACTOR_BYTES
        registry.unpin(digest)
        assert registry.resident_bytes() == (0, 0)

    def test_stays_under_its_other_name(self, registry: AdapterRegistry, written: dict[str, Path]):
        digest = register(registry, written["a"], "one").digest
        assert register(registry, written["a"], "two").digest == digest
        delete(registry, "one")
        assert registry.pin(digest).digest == digest

    def test_deleted_between_publishing_and_remembering(
        self, registry: AdapterRegistry, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ):
        publish = registry.store.publish

        def publish_and_lose(*args: object, **options: object) -> AdapterRecord:
            record = publish(*args, **options)  # type: ignore[arg-type]
            delete(registry, record.name)
            return record

        monkeypatch.setattr(registry.store, "publish", publish_and_lose)
        register(registry, written["a"])
        assert registry.resident_bytes() == (0, 0)

    @pytest.mark.parametrize("moment", ["digest_of", "read_adapter"])
    def test_deleted_while_it_is_read(
        self,
        moment: str,
        store: AdapterStore,
        model: AdaptedModel,
        written: dict[str, Path],
        monkeypatch: pytest.MonkeyPatch,
    ):
        digest = register(make_registry(store, model, FACTOR_BYTES), written["a"]).digest
        again = make_registry(store, model, FACTOR_BYTES)
        proceed = getattr(intake_module, moment)

        def delete_first(directory: Path) -> object:
            delete(again, "a")
            return proceed(directory)

        monkeypatch.setattr(intake_module, moment, delete_first)
        with pytest.raises(AdapterNotFound):
            again.pin(digest)
        assert state(again, digest) is AdapterState.STORED


class TestThreads:
    @contextmanager
    def composing(
        self, registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[tuple[threading.Event, threading.Event, list[str]]]:
        """Composition that says when it has begun, waits to be let go, and is counted."""
        begun, go, composed = threading.Event(), threading.Event(), list[str]()
        compose = registry._compose

        def slow(digest: str, compact: TopKCheckpoint) -> AdapterFactors:
            composed.append(digest)
            begun.set()
            assert go.wait(WAIT_S)
            return compose(digest, compact)

        with monkeypatch.context() as patch:
            patch.setattr(registry, "_compose", slow)
            yield begun, go, composed
            go.set()

    def test_concurrent_pins_compose_once(
        self, registry: AdapterRegistry, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ):
        digest = register(registry, written["a"]).digest
        with self.composing(registry, monkeypatch) as (begun, go, composed), ThreadPoolExecutor(8) as pool:
            pins = [pool.submit(registry.pin, digest) for _ in range(8)]
            assert begun.wait(WAIT_S)
            assert state(registry, digest) is AdapterState.LOADING
            go.set()
            results = {id(pin.result(WAIT_S)) for pin in pins}
        assert (len(results), composed) == (1, [digest])
        assert registry.status(digest).pins == 8

    def test_others_are_served_while_one_composes(
        self, registry: AdapterRegistry, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ):
        slow, ready = (register(registry, written[name]).digest for name in "ab")
        registry.pin(ready)
        with self.composing(registry, monkeypatch) as (begun, go, _), ThreadPoolExecutor(1) as pool:
            pin = pool.submit(registry.pin, slow)
            assert begun.wait(WAIT_S)
            assert registry.pin(ready).digest == ready
            registry.unpin(ready)
            assert registry.resident_bytes()[1] == FACTOR_BYTES
            go.set()
            assert pin.result(WAIT_S).digest == slow

    def test_a_failure_reaches_everyone_who_waits(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ):
        digest = register(make_registry(store, model, FACTOR_BYTES), written["a"]).digest
        flip_a_bit(store, digest)
        again = make_registry(store, model, FACTOR_BYTES)
        everyone = threading.Barrier(6)

        def pin() -> None:
            everyone.wait(WAIT_S)
            again.pin(digest)

        with ThreadPoolExecutor(6) as pool:
            outcomes = [pool.submit(pin) for _ in range(6)]
        assert all(isinstance(outcome.exception(), AdapterUnavailable) for outcome in outcomes)
        assert again.status(digest).pins == 0

    def test_deleted_while_it_composes(
        self, registry: AdapterRegistry, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ):
        digest = register(registry, written["a"]).digest
        with self.composing(registry, monkeypatch) as (begun, go, _), ThreadPoolExecutor(1) as pool:
            pin = pool.submit(registry.pin, digest)
            assert begun.wait(WAIT_S)
            delete(registry, "a")
            go.set()
            assert pin.result(WAIT_S).digest == digest, "who asked in time is served"
        registry.unpin(digest)
        assert registry.resident_bytes() == (0, 0)

    def test_everything_at_once_ends_with_nothing_held(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path]
    ):
        registry = make_registry(store, model, budget=2 * FACTOR_BYTES)
        known = digests(registry, written)
        expected = {known[name]: factors(path) for name, path in written.items()}

        def work(seed: int) -> None:
            for step in range(40):
                digest = known["abcd"[(seed * 7 + step * step) % 4]]
                pinned = registry.pin(digest)
                for name, layer in expected[digest].layers.items():
                    assert torch.equal(pinned.layers[name].a, layer.a)
                registry.unpin(digest)

        with ThreadPoolExecutor(6) as pool:
            for outcome in [pool.submit(work, seed) for seed in range(6)]:
                outcome.result(WAIT_S)
        assert all(registry.status(digest).pins == 0 for digest in known.values())
        assert registry.resident_bytes()[1] <= 2 * FACTOR_BYTES


def test_who_holds_an_adapter_never_waits_for_the_disk(
    registry: AdapterRegistry, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another adapter is published, whose commit a slow disk holds up, and deletions wait behind it."""
    digest, deleted = register(registry, written["a"]).digest, register(registry, written["b"]).digest
    registry.pin(digest)
    registry.unpin(digest)
    asked, disk = threading.Event(), threading.Event()
    in_use = registry.store.digest_in_use

    def slow(digest: str) -> bool:
        asked.set()
        assert disk.wait(WAIT_S)
        return in_use(digest)

    monkeypatch.setattr(registry.store, "digest_in_use", slow)
    with ThreadPoolExecutor(2) as pool:
        forgetting = pool.submit(delete, registry, "b")
        assert asked.wait(WAIT_S)
        pinned = pool.submit(registry.pin_loaded, digest)
        try:
            assert pinned.result(WAIT_S) is not None
            pool.submit(registry.unpin, digest).result(WAIT_S)
        finally:
            disk.set()
        forgetting.result(WAIT_S)
    assert registry.status(deleted).resident_bytes == 0


def test_a_version_deleted_before_it_is_pinned_leaves_nothing_behind(
    registry: AdapterRegistry, written: dict[str, Path]
) -> None:
    digest = register(registry, written["a"]).digest
    delete(registry, "a")
    with pytest.raises(AdapterNotFound):
        registry.pin(digest)
    assert digest not in registry._live
