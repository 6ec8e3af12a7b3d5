"""Equal banks of registered adapters are one in memory, one on the device, counted once, and gone with the last."""

from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.binding import BaseIdentity
from adapters.checkpoint import TopKCheckpoint
from adapters.errors import AdapterTooLarge
from adapters.export import write_adapter
from adapters.factors import AdapterFactors
from adapters.layers import AdaptedModel
from adapters.registry import AdapterRegistry
from adapters.shared_banks import SharedBanks, bytes_together
from adapters.split_file import WEIGHTS_FILE, is_split
from adapters.store import AdapterStore
from adapters.vector_bank import VectorBank
from tests.factories import AdapterSpec, make_adapter, rewrite, tiny_model
from tests.lora_factory import make_lora
from tests.unit.adapters.store_support import assert_consistent, banks
from tests.unit.adapters.support import BANK, adapted, compact

LLAMA = tiny_model("llama")
BANK_BYTES = 4 * 32 * 16
FACTOR_BYTES = 4 * 2 * 4 * (64 + 64)  # float32, two layers, rank 4
HOST = torch.device("cpu")
META = torch.device("meta")  # a device elsewhere, without one


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    return adapted(LLAMA)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters a, b and c on one bank, and `alone` on its own."""
    root = tmp_path_factory.mktemp("family")
    made = {
        name: make_adapter(LLAMA, AdapterSpec(target_modules=["q_proj"], seed=seed), root / "own" / name)
        for seed, name in enumerate(("a", "b", "c", "alone"))
    }
    bank = load_file(made["a"] / WEIGHTS_FILE)[BANK]
    return {
        name: path if name == "alone" else rewrite(path, root / name, tensors={BANK: bank.clone()})
        for name, path in made.items()
    }


@pytest.fixture
def registry(store: AdapterStore, model: AdaptedModel) -> AdapterRegistry:
    return make_registry(store, model)


def make_registry(
    store: AdapterStore, model: AdaptedModel, device: torch.device = HOST, budget: int = 1 << 30
) -> AdapterRegistry:
    return AdapterRegistry(store, model, BaseIdentity(frozenset()), factor_budget=budget, device=device)


def register(registry: AdapterRegistry, source: Path, name: str | None = None, **options: bool) -> str:
    with registry.store.staging() as staged:
        shutil.copytree(source, staged, dirs_exist_ok=True)
        return registry.register("", name or source.name, staged, **options).digest


def bank_of(registry: AdapterRegistry, digest: str) -> VectorBank:
    checkpoint = registry.compact(digest)
    assert isinstance(checkpoint, TopKCheckpoint)
    return checkpoint.bank


def copied(checkpoint: TopKCheckpoint) -> TopKCheckpoint:
    """As it is when it is read again."""
    return replace(checkpoint, bank=VectorBank(checkpoint.bank.vectors.clone()))


class TestInMemory:
    def test_a_family_has_one_bank(self, registry: AdapterRegistry, family: dict[str, Path]) -> None:
        found = {name: bank_of(registry, register(registry, path)) for name, path in family.items()}
        assert found["a"] is found["b"] is found["c"] is not found["alone"]

    def test_also_after_a_restart(
        self, registry: AdapterRegistry, store: AdapterStore, model: AdaptedModel, family: dict[str, Path]
    ) -> None:
        digests = [register(registry, path) for path in family.values()]
        again = make_registry(store, model)
        assert again.check_stored() == 0
        factors = [again.pin(digest) for digest in digests]
        assert len({id(bank_of(again, digest)) for digest in digests}) == 2
        for path, made in zip(family.values(), factors, strict=True):
            for layer, a, b_t in compact(path).factors():
                torch.testing.assert_close(made.layers[layer.name].a, a)
                torch.testing.assert_close(made.layers[layer.name].b_t, b_t)

    def test_it_is_counted_once(self, registry: AdapterRegistry, family: dict[str, Path]) -> None:
        a = register(registry, family["a"])
        alone, _ = registry.resident_bytes()
        b = register(registry, family["b"])
        both, _ = registry.resident_bytes()
        assert alone == registry.status(a).resident_bytes
        assert both == 2 * alone - BANK_BYTES
        assert registry.status(b).resident_bytes == alone, "what it would take alone"

    def test_what_is_counted_follows_every_change(
        self, store: AdapterStore, model: AdaptedModel, registry: AdapterRegistry, family: dict[str, Path]
    ) -> None:
        def counted(registry: AdapterRegistry) -> int:
            kept = [live.compact for live in registry._live.values() if live.compact is not None]
            compact, _ = registry.resident_bytes()
            assert compact == bytes_together(kept)
            return compact

        a = register(registry, family["a"])
        alone = counted(registry)
        b = register(registry, family["b"])
        assert counted(registry) > alone
        registry.pin(b)
        registry.store.delete("", "b")
        registry.forget_deleted([b])
        assert counted(registry) > alone, "pinned"
        registry.unpin(b)
        assert counted(registry) == alone
        again = make_registry(store, model)
        assert counted(again) == 0
        again.pin(a)
        assert counted(again) == alone, "read when it was first used"
        again.unpin(a)
        again.store.delete("", "a")
        again.forget_deleted([a])
        assert counted(again) == 0

    def test_it_goes_with_the_last_that_has_it(self, registry: AdapterRegistry, family: dict[str, Path]) -> None:
        digests = {name: register(registry, family[name]) for name in "ab"}
        bank = weakref.ref(bank_of(registry, digests["a"]))
        for name in "ab":
            gc.collect()
            assert bank() is not None
            registry.store.delete("", name)
            registry.forget_deleted([digests[name]])
        gc.collect()
        assert bank() is None
        assert registry.resident_bytes() == (0, 0)

    def test_versions_and_blends_of_a_family_share(
        self, registry: AdapterRegistry, store: AdapterStore, family: dict[str, Path], tmp_path: Path
    ) -> None:
        digests = {name: register(registry, path) for name, path in family.items()}
        register(registry, family["b"], "a", replace=True)
        blends = []
        for pair in ("ab", "bc"):
            blend = registry.blend([(digests[name], 0.5) for name in pair])
            write_adapter(blend, tmp_path / pair)
            blends.append(register(registry, tmp_path / pair))
        assert bank_of(registry, blends[0]) is bank_of(registry, blends[1])
        assert sorted(banks(tmp_path / "data").values()) == [1, 2, 3], "of `alone`, the blends and the family"
        assert all(is_split(store.path(digest) / WEIGHTS_FILE) for digest in (*digests.values(), *blends))
        assert_consistent(store, tmp_path / "data")

    @pytest.mark.parametrize("change", ["a value", "dtype", "shape"])
    def test_only_equal_banks_are_one(self, family: dict[str, Path], change: str) -> None:
        shared = SharedBanks(HOST)
        first = compact(family["a"])
        vectors = first.bank.vectors.clone()
        if change == "a value":
            vectors[3, 4] += 1
        elif change == "dtype":
            vectors = vectors.view(torch.int32)
        else:
            vectors = vectors.view(16, 32)
        other = replace(first, bank=VectorBank(vectors))
        assert shared.shared(first) is first
        assert shared.shared(other).bank is other.bank  # type: ignore[union-attr]
        assert shared.shared(copied(first)).bank is first.bank  # type: ignore[union-attr]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bits(self, family: dict[str, Path], dtype: torch.dtype) -> None:
        shared = SharedBanks(HOST)
        first = compact(family["a"])
        first = replace(first, bank=VectorBank(first.bank.vectors.to(dtype)))
        assert shared.shared(first).bank is shared.shared(copied(first)).bank  # type: ignore[union-attr]

    def test_plain_lora_has_none(self, registry: AdapterRegistry, family: dict[str, Path], tmp_path: Path) -> None:
        plain = register(registry, make_lora(LLAMA, tmp_path / "plain", target_modules=["q_proj"]))
        before = registry.resident_bytes()[0]
        a = register(registry, family["a"])
        assert bytes_together([registry.compact(plain), registry.compact(a)]) == registry.resident_bytes()[0] > before


class TestOnTheDevice:
    def test_on_the_host_it_is_where_it_was(self, family: dict[str, Path]) -> None:
        shared = SharedBanks(HOST)
        checkpoint = compact(family["a"])
        assert shared.on_device(checkpoint.bank) is checkpoint.bank
        assert (shared.copied_bytes(), shared.most_copied(checkpoint.layout)) == (0, 0)

    def test_elsewhere_there_is_one_copy_for_as_long_as_it_is_held(self, family: dict[str, Path]) -> None:
        shared = SharedBanks(META)
        first = shared.shared(compact(family["a"]))
        second = shared.shared(compact(family["b"]))
        assert isinstance(first, TopKCheckpoint)
        assert isinstance(second, TopKCheckpoint)
        copy = shared.on_device(first.bank)
        assert copy.vectors.device == META
        assert shared.on_device(second.bank) is copy
        assert shared.on_device(copied(second).bank) is copy, "one that is not shared on the host is shared there"
        assert shared.copied_bytes() == BANK_BYTES == shared.most_copied(first.layout)
        held = [AdapterFactors("a", {}, bank=copy), AdapterFactors("b", {}, bank=copy)]
        del copy
        held.pop()
        gc.collect()
        assert shared.copied_bytes() == BANK_BYTES
        held.pop()
        gc.collect()
        assert shared.copied_bytes() == 0

    def test_factors_hold_what_they_were_composed_from(
        self, registry: AdapterRegistry, family: dict[str, Path]
    ) -> None:
        digest = register(registry, family["a"])
        assert registry.pin(digest).bank is bank_of(registry, digest)
        assert registry.resident_bytes()[1] == FACTOR_BYTES

    def test_a_copy_counts_once_and_goes_when_its_factors_are_evicted(
        self, store: AdapterStore, model: AdaptedModel, family: dict[str, Path]
    ) -> None:
        registry = make_registry(store, model, META, budget=2 * FACTOR_BYTES + BANK_BYTES)
        digests = {name: register(registry, family[name]) for name in ("a", "b", "alone")}
        for name in "ab":
            registry.pin(digests[name])
            registry.unpin(digests[name])
        gc.collect()
        assert (registry.resident_bytes()[1], registry.stats().evictions) == (2 * FACTOR_BYTES + BANK_BYTES, 0)
        registry.pin(digests["alone"])
        assert registry.stats().evictions == 2, "one pair of factors and two banks do not fit beside another"
        assert registry.resident_bytes()[1] == FACTOR_BYTES + BANK_BYTES
        assert registry.has_room_for([digests["alone"]])
        assert not registry.has_room_for([digests["a"]])

    def test_with_its_copy_an_adapter_may_be_too_large(
        self, store: AdapterStore, model: AdaptedModel, family: dict[str, Path]
    ) -> None:
        register(make_registry(store, model, HOST, budget=FACTOR_BYTES), family["a"])
        with pytest.raises(AdapterTooLarge):
            register(make_registry(store, model, META, budget=FACTOR_BYTES), family["b"])
