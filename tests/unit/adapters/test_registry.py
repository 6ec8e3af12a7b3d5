"""What is live: taken in strictly, composed once, pinned while in use, evicted by age, and never served when broken."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters import registry as registry_module
from adapters.binding import BaseIdentity
from adapters.checkpoint import TopKCheckpoint
from adapters.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnavailable,
    BaseModelMismatch,
    NonFinite,
    ShapeMismatch,
    StoreError,
    UnexpectedTensor,
)
from adapters.factors import AdapterFactors
from adapters.layers import AdaptedModel
from adapters.registry import AdapterRegistry, AdapterState, RegistryStats
from adapters.store import AdapterRecord, AdapterStore, digest_of
from tests.factories import WEIGHTS_FILE, AdapterSpec, make_adapter, rewrite, tiny_model
from tests.unit.adapters.support import BANK, adapted, factors

LLAMA = tiny_model("llama")
IDENTITY = BaseIdentity(frozenset({"org/base"}))
SPEC = AdapterSpec(target_modules=["q_proj"])
FACTOR_BYTES = 4 * 2 * 4 * (64 + 64)  # float32, two layers, rank 4
WAIT_S = 30


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    return adapted(LLAMA)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters a, b, c and d, alike but for their values."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(LLAMA, AdapterSpec(target_modules=["q_proj"], seed=seed), root / name)
        for seed, name in enumerate("abcd")
    }


@pytest.fixture
def registry(store: AdapterStore, model: AdaptedModel) -> AdapterRegistry:
    return make_registry(store, model, budget=10 * FACTOR_BYTES)


def make_registry(store: AdapterStore, model: AdaptedModel, budget: int) -> AdapterRegistry:
    return AdapterRegistry(store, model, IDENTITY, factor_budget=budget, device=torch.device("cpu"))


def register(registry: AdapterRegistry, source: Path, name: str | None = None, **options: bool) -> AdapterRecord:
    with registry.store.staging() as staged:
        shutil.copytree(source, staged, dirs_exist_ok=True)
        return registry.register("", name or source.name, staged, **options)


def digests(registry: AdapterRegistry, written: dict[str, Path]) -> dict[str, str]:
    """All of them registered."""
    return {name: register(registry, path).digest for name, path in written.items()}


def state(registry: AdapterRegistry, digest: str) -> AdapterState:
    return registry.status(digest).state


def delete(registry: AdapterRegistry, name: str) -> None:
    record = registry.store.delete("", name)
    registry.forget_deleted([version.digest for version in record.versions])


class TestRegister:
    def test_describes_what_it_takes_in(self, registry: AdapterRegistry, written: dict[str, Path]):
        record = register(registry, written["a"])
        info = registry.store.get("", "a").info
        assert record.digest.startswith("sha256:")
        assert info["target_modules"] == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
        assert info["parameters"]["vblora_params"] == 32 * 16 + 64 + 2 * 64 // 4
        assert info["config"]["num_vectors"] == 32
        assert info["resumable"] is False
        assert len(info["warnings"]) == 1
        assert "no base model" in info["warnings"][0]
        assert state(registry, record.digest) is AdapterState.STORED

    def test_full_logits_are_kept_compact(self, registry: AdapterRegistry, tmp_path: Path):
        source = make_adapter(LLAMA, AdapterSpec(target_modules=["q_proj"], compact=False), tmp_path / "full")
        record = register(registry, source)
        assert record.info["resumable"] is True
        assert record.info["parameters"]["storage"] == "logits"
        bank, positions = 32 * 16, 64
        assert registry.status(record.digest).resident_bytes == 4 * bank + positions * (2 * 1 + 4)

    def test_resident_bytes_are_about_the_files(self, registry: AdapterRegistry, written: dict[str, Path]):
        record = register(registry, written["a"])
        data = sum(t.nbytes for t in load_file(written["a"] / WEIGHTS_FILE).values())
        assert registry.status(record.digest).resident_bytes == data < record.file_bytes
        assert registry.resident_bytes() == (data, 0)
        registry.pin(record.digest)
        assert registry.resident_bytes() == (data, FACTOR_BYTES)
        assert registry.status(record.digest).resident_bytes == data + FACTOR_BYTES

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_refused_adapters_leave_nothing_behind(
        self, registry: AdapterRegistry, written: dict[str, Path], tmp_path: Path
    ):
        nan = rewrite(written["a"], tmp_path / "nan", {BANK: torch.full((32, 16), float("nan"))})
        deeper = make_adapter(tiny_model("llama", num_hidden_layers=3), SPEC, tmp_path / "deeper")
        other = rewrite(written["a"], tmp_path / "other", None, {"base_model_name_or_path": "org/other"})
        for error, source in {
            NonFinite: nan,
            UnexpectedTensor: deeper,
            BaseModelMismatch: other,
        }.items():
            with pytest.raises(error):
                register(registry, source)
        assert registry.store.count("") == 0
        assert registry.resident_bytes() == (0, 0)

    def test_sizes_are_checked_before_a_tensor_is_read(
        self,
        store: AdapterStore,
        model: AdaptedModel,
        written: dict[str, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """A layer of another size, another base, and factors beyond the budget: the header tells them all."""
        monkeypatch.setattr(registry_module, "read_adapter", lambda directory: pytest.fail("read"))
        wider = make_adapter(tiny_model("llama", hidden_size=128), SPEC, tmp_path / "wider")
        other = rewrite(written["a"], tmp_path / "other", None, {"base_model_name_or_path": "org/other"})
        with pytest.raises(ShapeMismatch):
            register(make_registry(store, model, budget=10 * FACTOR_BYTES), wider)
        with pytest.raises(BaseModelMismatch):
            register(make_registry(store, model, budget=10 * FACTOR_BYTES), other)
        with pytest.raises(AdapterTooLarge):
            register(make_registry(store, model, budget=FACTOR_BYTES - 1), written["a"])

    def test_values_that_the_bases_dtype_cannot_hold(self, store: AdapterStore, tmp_path: Path):
        source = make_adapter(LLAMA, AdapterSpec(modules_to_save=["lm_head"]), tmp_path / "source")
        key = "base_model.model.lm_head.weight"
        large = rewrite(source, tmp_path / "large", {key: torch.full((272, 64), 1e5)})
        half = make_registry(store, adapted(LLAMA, torch.float16), budget=1 << 24)
        with pytest.raises(NonFinite) as refusal:
            register(half, large)
        assert refusal.value.subject == key

    def test_another_base_may_be_allowed(self, registry: AdapterRegistry, written: dict[str, Path], tmp_path: Path):
        other = rewrite(written["a"], tmp_path / "other", None, {"base_model_name_or_path": "org/other"})
        assert register(registry, other, allow_base_mismatch=True).name == "other"

    def test_a_name_that_exists(self, registry: AdapterRegistry, written: dict[str, Path]):
        first = register(registry, written["a"], "name")
        with pytest.raises(AdapterExists):
            register(registry, written["b"], "name")
        second = register(registry, written["b"], "name", replace=True)
        assert second.digest != first.digest
        assert registry.pin(first.digest).digest == first.digest, "the version before is still there"

    def test_versions_that_are_pruned_leave_memory(self, registry: AdapterRegistry, written: dict[str, Path]):
        """The store keeps two versions: so does the registry."""
        one = register(registry, written["a"], "name")
        compact_bytes, _ = registry.resident_bytes()
        for name in "bcd":
            register(registry, written[name], "name", replace=True)
        assert registry.resident_bytes()[0] == 2 * compact_bytes
        with pytest.raises(AdapterNotFound):
            registry.pin(one.digest)

    def test_a_pinned_version_that_is_pruned_stays_until_unpinned(
        self, registry: AdapterRegistry, written: dict[str, Path]
    ):
        one = register(registry, written["a"], "name")
        registry.pin(one.digest)
        for name in "bcd":
            register(registry, written[name], "name", replace=True)
        assert state(registry, one.digest) is AdapterState.READY
        registry.unpin(one.digest)
        assert registry.status(one.digest).resident_bytes == 0


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
        proceed = getattr(registry_module, moment)

        def delete_first(directory: Path) -> object:
            delete(again, "a")
            return proceed(directory)

        monkeypatch.setattr(registry_module, moment, delete_first)
        with pytest.raises(AdapterNotFound):
            again.pin(digest)
        assert state(again, digest) is AdapterState.STORED


class TestFailure:
    @staticmethod
    def flip_a_bit(store: AdapterStore, digest: str, file: str = WEIGHTS_FILE) -> None:
        path = store.path(digest) / file
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(content)

    def test_a_flipped_bit_is_detected_and_mended_by_a_new_upload(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path]
    ):
        digest = register(make_registry(store, model, FACTOR_BYTES), written["a"]).digest
        self.flip_a_bit(store, digest)
        again = make_registry(store, model, FACTOR_BYTES)
        for _ in range(2):
            with pytest.raises(AdapterUnavailable, match="upload it again"):
                again.pin(digest)
        status = again.status(digest)
        assert (status.state, status.pins) == (AdapterState.FAILED, 0)
        assert "changed since the upload" in (status.reason or "")

        assert register(again, written["a"], replace=True).digest == digest
        assert again.pin(digest).digest == digest
        assert state(again, digest) is AdapterState.READY

    @pytest.mark.parametrize("file", [WEIGHTS_FILE, "adapter_config.json"])
    def test_a_flipped_bit_is_found_at_start_and_the_others_are_served(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path], file: str
    ):
        known = digests(make_registry(store, model, 10 * FACTOR_BYTES), written)
        self.flip_a_bit(store, known["b"], file)
        again = make_registry(store, model, 10 * FACTOR_BYTES)
        assert again.check_stored() == 1
        for name, digest in known.items():
            assert state(again, digest) is (AdapterState.FAILED if name == "b" else AdapterState.STORED)
            if name != "b":
                assert again.pin(digest).digest == digest
        assert "changed since the upload" in (again.status(known["b"]).reason or "")
        with pytest.raises(AdapterUnavailable, match="upload it again"):
            again.pin(known["b"])

    def test_a_bit_that_flips_after_the_start_is_found_when_it_is_loaded(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path]
    ):
        digest = register(make_registry(store, model, FACTOR_BYTES), written["a"]).digest
        again = make_registry(store, model, FACTOR_BYTES)
        assert again.check_stored() == 0
        self.flip_a_bit(store, digest)
        with pytest.raises(AdapterUnavailable, match="upload it again"):
            again.pin(digest)
        assert state(again, digest) is AdapterState.FAILED

    def test_another_base_after_a_restart(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path], tmp_path: Path
    ):
        one_layer = make_adapter(LLAMA, AdapterSpec(target_modules=r".*\.0\.self_attn\.q_proj"), tmp_path / "one")
        before = make_registry(store, model, FACTOR_BYTES)
        known = {"fits": register(before, one_layer).digest, "a": register(before, written["a"]).digest}
        again = make_registry(store, adapted(tiny_model("llama", num_hidden_layers=1)), FACTOR_BYTES)
        assert again.check_stored() == 1
        status = again.status(known["a"])
        assert status.state is AdapterState.FAILED
        assert "model.layers.1.self_attn.q_proj" in (status.reason or "")
        with pytest.raises(AdapterUnavailable, match=r"model\.layers\.1"):
            again.pin(known["a"])
        assert again.pin(known["fits"]).digest == known["fits"]
        delete(again, "a")
        assert state(again, known["a"]) is AdapterState.STORED

    @pytest.mark.parametrize("damage", ["no files", "no config", "unreadable"])
    def test_damaged_files_do_not_keep_the_server_from_starting(
        self, damage: str, store: AdapterStore, model: AdaptedModel, written: dict[str, Path]
    ):
        known = digests(make_registry(store, model, FACTOR_BYTES), written)
        broken = store.path(known["b"])
        if damage == "no files":
            shutil.rmtree(broken)
        elif damage == "no config":
            (broken / "adapter_config.json").unlink()
        else:
            (broken / WEIGHTS_FILE).unlink()
            (broken / WEIGHTS_FILE).symlink_to(WEIGHTS_FILE)  # reading it is an OSError: too many levels
        again = make_registry(store, model, FACTOR_BYTES)
        assert again.check_stored() == 1
        assert {name: state(again, digest) for name, digest in known.items()} == {
            name: AdapterState.FAILED if name == "b" else AdapterState.STORED for name in known
        }

    def test_mended_while_the_damage_is_being_found(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ):
        digest = register(make_registry(store, model, FACTOR_BYTES), written["a"]).digest
        self.flip_a_bit(store, digest)
        again = make_registry(store, model, FACTOR_BYTES)

        def digest_then_upload(directory: Path) -> str:
            found = digest_of(directory)
            register(again, written["a"], replace=True)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(registry_module, "digest_of", digest_then_upload)
            with pytest.raises(AdapterUnavailable):
                again.pin(digest)
        assert again.pin(digest).digest == digest

    def test_what_may_pass_is_tried_again(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ):
        digest = register(make_registry(store, model, FACTOR_BYTES), written["a"]).digest
        again = make_registry(store, model, FACTOR_BYTES)
        for error in (StoreError("changed while it was read"), OSError("too many open files"), MemoryError()):
            with monkeypatch.context() as patch:
                patch.setattr(registry_module, "digest_of", raising(error))
                with pytest.raises(type(error)):
                    again.pin(digest)
            assert state(again, digest) is AdapterState.STORED
            assert again.status(digest).pins == 0
        assert again.pin(digest).digest == digest


def raising(error: Exception) -> Callable[..., Tensor]:
    def function(*_: object) -> Tensor:
        raise error

    return function


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
        TestFailure.flip_a_bit(store, digest)
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
