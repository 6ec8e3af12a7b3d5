"""What is taken in: adapters that fit the base, and of those in the store, what is whole; the others are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters import intake as intake_module
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
from adapters.layers import AdaptedModel
from adapters.registry import AdapterRegistry
from adapters.status import AdapterState
from adapters.store import AdapterStore, digest_of
from tests.factories import WEIGHTS_FILE, AdapterSpec, make_adapter, rewrite, tiny_model
from tests.unit.adapters.registries import (
    FACTOR_BYTES,
    LLAMA,
    SPEC,
    delete,
    digests,
    flip_a_bit,
    make_registry,
    register,
    state,
)
from tests.unit.adapters.support import BANK, adapted

WAIT_S = 30


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
        monkeypatch.setattr(intake_module, "read_adapter", lambda directory: pytest.fail("read"))
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


class TestFailure:
    def test_a_flipped_bit_is_detected_and_mended_by_a_new_upload(
        self, store: AdapterStore, model: AdaptedModel, written: dict[str, Path]
    ):
        digest = register(make_registry(store, model, FACTOR_BYTES), written["a"]).digest
        flip_a_bit(store, digest)
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
        flip_a_bit(store, known["b"], file)
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
        flip_a_bit(store, digest)
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
        flip_a_bit(store, digest)
        again = make_registry(store, model, FACTOR_BYTES)

        def digest_then_upload(directory: Path) -> str:
            found = digest_of(directory)
            register(again, written["a"], replace=True)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(intake_module, "digest_of", digest_then_upload)
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
                patch.setattr(intake_module, "digest_of", raising(error))
                with pytest.raises(type(error)):
                    again.pin(digest)
            assert state(again, digest) is AdapterState.STORED
            assert again.status(digest).pins == 0
        assert again.pin(digest).digest == digest


def raising(error: Exception) -> Callable[..., Tensor]:
    def function(*_: object) -> Tensor:
        raise error

    return function
