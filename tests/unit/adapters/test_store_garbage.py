"""A shared store checked, and what nothing names in it collected: never what anything names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from adapters.errors import StoreUnavailable
from adapters.store import digest_of
from adapters.store.inventory import Problem
from adapters.store.shared import SharedAdapterStore, garbage
from adapters.store.shared.garbage import examine, repair
from adapters.store.shared.keys import blob_key, manifest_key
from adapters.store.shared.objects import ObjectStore
from tests.unit.adapters.shared_support import Faulty, shared
from tests.unit.adapters.store_support import SHARED, publish

NOW = -5.0  # a grace that everything is beyond, as storages tell the time in whole seconds
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def store(objects: ObjectStore, tmp_path: Path) -> Iterator[SharedAdapterStore]:
    with closing(shared(objects, tmp_path / "data")) as store:
        yield store


def keys(objects: ObjectStore) -> list[str]:
    return sorted(info.key for info in objects.list("blobs"))


def test_a_sound_store(store: SharedAdapterStore, objects: ObjectStore) -> None:
    publish(store, "sql", b"1")
    publish(store, "sql", b"2")
    publish(store, "sql", b"2", tenant="t")
    report = repair(objects, grace_s=NOW)
    assert (report.found, report.remaining) == ((), ())
    assert (report.adapters, report.versions, report.files) == (2, 3, 2)


def test_what_was_deleted_goes_after_the_grace(store: SharedAdapterStore, objects: ObjectStore) -> None:
    kept, gone = publish(store, "kept", b"1").digest, publish(store, "gone", b"2").digest
    store.delete(SHARED, "gone")
    assert not repair(objects).found, "it is young: somebody may be about to name it"
    report = examine(objects, grace_s=NOW)
    assert [(finding.problem, finding.subject) for finding in report.remaining] == [(Problem.UNREFERENCED, gone)]
    report = repair(objects, grace_s=NOW)
    assert (len(report.found), report.remaining) == (1, ())
    assert {key.split("/")[2] for key in keys(objects)} == {kept.removeprefix("sha256:")}


def test_nothing_is_collected_while_a_manifest_is_unreadable(store: SharedAdapterStore, objects: ObjectStore) -> None:
    publish(store, "sql", tenant="t")
    publish(store, "gone", b"2")
    store.delete(SHARED, "gone")
    content = objects.get(manifest_key("t"))
    assert content is not None
    objects.put(manifest_key("t"), b"{", over=content.etag)
    before = keys(objects)
    problems = {finding.problem for finding in repair(objects, grace_s=NOW).remaining}
    assert problems == {Problem.MANIFEST, Problem.UNREFERENCED}
    assert keys(objects) == before


def test_lost_and_damaged_files_are_found(store: SharedAdapterStore, objects: ObjectStore, tmp_path: Path) -> None:
    lost, damaged = publish(store, "lost", b"1").digest, publish(store, "damaged", b"2", tenant="t").digest
    objects.delete(blob_key(lost, WEIGHTS))
    objects.delete(blob_key(lost, "adapter_config.json"))
    (tmp_path / "other").write_bytes(b"3")
    objects.put_file(blob_key(damaged, WEIGHTS), tmp_path / "other")
    remaining = repair(objects, grace_s=NOW).remaining
    assert {(finding.problem, finding.subject) for finding in remaining} == {
        (Problem.MISSING, "lost"), (Problem.DAMAGED, "t/damaged"),
    }  # fmt: skip
    publish(store, "lost", b"1")
    publish(store, "damaged", b"2", tenant="t")
    assert not examine(objects, grace_s=NOW).found, "whoever has the files publishes them again"


def test_published_between_the_look_and_the_removal(store: SharedAdapterStore, objects: ObjectStore) -> None:
    digest = publish(store, "gone", b"1").digest
    store.delete(SHARED, "gone")
    faulty = Faulty(objects)

    def again(call: str, key: str) -> None:
        if call == "list" and key == "tenants":
            faulty.before = lambda call, key: None
            publish(store, "back", b"1")

    faulty.after = lambda call, key: setattr(faulty, "before", again) if call == "list" and key == "tenants" else None
    repair(faulty, grace_s=NOW)
    assert not examine(objects, grace_s=NOW).found
    assert digest_of(store.fetch(digest)) == digest


def test_named_while_it_was_removed(
    store: SharedAdapterStore, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publisher has put the files, committed, and seen them there; then they are removed."""
    publish(store, "gone", b"1")
    store.delete(SHARED, "gone")
    faulty = Faulty(objects)

    def publish_first(call: str, key: str) -> None:
        if call == "delete":
            faulty.before = lambda call, key: None
            publish(store, "back", b"1")

    faulty.before = publish_first
    repair(faulty, grace_s=NOW)
    assert store.get(SHARED, "back")
    assert not examine(objects, grace_s=NOW).found


def test_a_store_that_does_not_answer(objects: ObjectStore) -> None:
    faulty = Faulty(objects)

    def fail(call: str, key: str) -> None:
        raise StoreUnavailable("down")

    faulty.before = fail
    with pytest.raises(StoreUnavailable):
        repair(faulty)


def test_the_default_grace_is_an_hour() -> None:
    assert garbage.GRACE_S == 3600
