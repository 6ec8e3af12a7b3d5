"""What the adapter store promises its callers: names, versions, activations, pages, and threads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import adapters
from adapters.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterUnavailable,
    InvalidName,
    InvalidSelection,
    UnsupportedCheckpoint,
)
from adapters.store import Activation, AdapterRecord, AdapterStore, AdapterVersion, Store, check_name, digest_of
from adapters.store.shared import SharedAdapterStore
from adapters.store.shared.manifest import Entry
from tests.unit.adapters.shared_support import objects_of, shared

SHARED = ""


def publish(
    store: Store,
    name: str,
    weights: bytes = b"weights",
    *,
    tenant: str = SHARED,
    info: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> AdapterRecord:
    with store.staging() as staged:
        (staged / "adapter_config.json").write_text("{}")
        (staged / "adapter_model.safetensors").write_bytes(weights)
        return store.publish(tenant, name, staged, info or {}, replace=replace)


def digests(record: AdapterRecord) -> list[str]:
    return [version.digest for version in record.versions]


def blobs(data_dir: Path) -> set[str]:
    """The digests whose files are on this machine."""
    own = data_dir / "blobs" / "sha256"
    return {f"sha256:{path.name}" for path in (own if own.is_dir() else data_dir / "shared" / "cache").iterdir()}


def assert_consistent(store: Store, data_dir: Path) -> None:
    """Whatever is listed is whole, and nothing else is kept."""
    listed = {version.digest for _, _, version in store.all_versions()}
    for digest in listed:
        with store.reading(digest) as directory:
            assert digest_of(directory) == digest
    assert blobs(data_dir) == listed
    tmp = data_dir / "tmp" if isinstance(store, AdapterStore) else store._cache.tmp  # type: ignore[attr-defined]
    assert list(tmp.iterdir()) == []


Opener = Callable[..., Store]


@pytest.fixture(params=["own", "file", "s3"])
def open_store(
    request: pytest.FixtureRequest, data_dir: Path, tmp_path: Path, s3_endpoint: Callable[[], str]
) -> Iterator[Opener]:
    """Opens the same store of one of the three kinds, again and again."""
    with ExitStack() as opened:

        def open_store(**options: Any) -> Store:
            if request.param == "own":
                store: Store = AdapterStore(data_dir, **options)
            else:
                store = shared(objects_of(request.param, tmp_path, s3_endpoint), data_dir, **options)
            opened.callback(store.close)
            return store

        yield open_store


@pytest.fixture
def store(open_store: Opener) -> Store:
    return open_store(keep_versions=3, reserved=frozenset({"tiny-base"}))


def fill(store: Store, tenant: str, versions: Mapping[str, list[AdapterVersion]]) -> None:
    """As if each had been published, oldest first: without its files, and so without their fsyncs."""
    if isinstance(store, AdapterStore):
        with store._writing() as catalog:
            for name, published in versions.items():
                for version in published:
                    catalog.put(tenant, name, version)
        return
    assert isinstance(store, SharedAdapterStore)
    entries = {
        name: Entry(name, AdapterRecord(
            tenant, name, newest.digest, 0.0, 0.0, newest.file_bytes, newest.info, (newest, *reversed(older))
        ))
        for name, (*older, newest) in versions.items()
    }  # fmt: skip
    store._manifests.change(tenant, lambda manifest: (replace(manifest, adapters=entries), None))


class TestPublish:
    def test_record_says_what_was_stored(self, store: Store, data_dir: Path) -> None:
        record = publish(store, "sql", info={"r": 4, "warnings": ["größe"]})
        assert (record.tenant, record.name) == (SHARED, "sql")
        assert record.info == {"r": 4, "warnings": ["größe"]}
        assert record.file_bytes == len(b"{}") + len(b"weights")
        assert record.created_at == record.updated_at
        assert record.versions == (AdapterVersion(record.digest, record.created_at, record.file_bytes, record.info),)
        assert record == store.get(SHARED, "sql")
        assert (store.path(record.digest) / "adapter_model.safetensors").read_bytes() == b"weights"
        assert_consistent(store, data_dir)

    def test_survives_a_restart(self, store: Store, data_dir: Path, open_store: Opener) -> None:
        record = publish(store, "sql", info={"r": 4})
        store.activate(SHARED, "sql", "merge")
        store.close()
        reopened = open_store()
        assert reopened.get(SHARED, "sql") == record
        assert reopened.active(SHARED) == Activation(SHARED, "sql", "merge", SHARED)
        assert_consistent(reopened, data_dir)

    def test_name_is_taken(self, store: Store, data_dir: Path) -> None:
        record = publish(store, "sql", b"1")
        with pytest.raises(AdapterExists, match="these very files") as same:
            publish(store, "sql", b"1")
        with pytest.raises(AdapterExists, match="other files"):
            publish(store, "sql", b"2")
        assert same.value.subject == "sql"
        assert store.get(SHARED, "sql") == record
        assert_consistent(store, data_dir)

    def test_replace_adds_a_version(self, store: Store, data_dir: Path) -> None:
        first = publish(store, "sql", b"1", info={"n": 1})
        second = publish(store, "sql", b"2", info={"n": 2}, replace=True)
        assert second.digest != first.digest
        assert second.info == {"n": 2}
        assert second.created_at == first.created_at <= second.updated_at
        assert digests(second) == [second.digest, first.digest]
        assert_consistent(store, data_dir)

    def test_replace_by_the_same_files_changes_nothing(self, store: Store) -> None:
        first = publish(store, "sql", b"1", info={"n": 1})
        assert publish(store, "sql", b"1", info={"n": 2}, replace=True) == first

    def test_an_earlier_version_published_again_becomes_the_newest(self, store: Store) -> None:
        first = publish(store, "sql", b"1", info={"n": 1})
        second = publish(store, "sql", b"2", replace=True)
        again = publish(store, "sql", b"1", info={"n": 3}, replace=True)
        assert digests(again) == [first.digest, second.digest]
        assert (again.digest, again.info) == (first.digest, {"n": 3})

    def test_old_versions_are_forgotten(self, store: Store, data_dir: Path) -> None:
        published = [publish(store, "sql", b"%d" % n, replace=True).digest for n in range(5)]
        assert digests(store.get(SHARED, "sql")) == published[:1:-1]
        assert_consistent(store, data_dir)

    def test_fewer_versions_are_kept_after_a_restart_that_says_so(
        self, store: Store, data_dir: Path, open_store: Opener
    ) -> None:
        published = [publish(store, "sql", b"%d" % n, replace=True).digest for n in range(3)]
        store.rollback(SHARED, "sql", published[0])
        store.close()
        frugal = open_store(keep_versions=1)
        assert digests(frugal.get(SHARED, "sql")) == published[::-1]
        newest = publish(frugal, "sql", b"3", replace=True)
        assert digests(newest) == [newest.digest]
        assert_consistent(frugal, data_dir)

    def test_tenants_do_not_share_names_but_files(self, store: Store, data_dir: Path) -> None:
        ours = publish(store, "sql", b"1", tenant="a")
        theirs = publish(store, "sql", b"1", tenant="b")
        assert ours.digest == theirs.digest
        assert (store.count("a"), store.count("b"), store.count(SHARED)) == (1, 1, 0)
        assert (store.names("a"), store.names(SHARED)) == ([("sql", ours.created_at)], [])
        with pytest.raises(AdapterNotFound):
            store.get(SHARED, "sql")
        assert_consistent(store, data_dir)

    def test_keeping_no_version_is_a_mistake(self, open_store: Opener) -> None:
        with pytest.raises(ValueError, match="keep_versions"):
            open_store(keep_versions=0)


class TestNames:
    @pytest.mark.parametrize("name", ["a", "0", "sql-v1.2_final", "A" * 128, "Base", "sha256"])
    def test_allowed(self, name: str) -> None:
        check_name(name)

    @pytest.mark.parametrize(
        "name",
        ["", ".", "..", "-a", "_a", "a/b", "../a", "a\n", "a b", "ä", "a\0", "a@b", "a" * 129, "\ud800", "base"],
    )
    def test_refused(self, store: Store, name: str) -> None:
        with pytest.raises(InvalidName):
            publish(store, name)
        with pytest.raises(AdapterNotFound):
            store.get(SHARED, name)
        assert not store.deactivate(SHARED, name)

    def test_reserved_by_the_server(self, store: Store) -> None:
        check_name("tiny-base")
        with pytest.raises(InvalidName, match="reserved"):
            publish(store, "tiny-base")


class TestFiles:
    def test_digest_is_the_documented_hash(self, tmp_path: Path) -> None:
        (tmp_path / "b").write_bytes(b"xyz")
        (tmp_path / "é").write_bytes(b"")
        (tmp_path / "B").write_bytes(b"q")
        encoded = b""
        for name, content in [("B", b"q"), ("b", b"xyz"), ("é", b"")]:
            encoded += len(name.encode()).to_bytes(8, "big") + name.encode()
            encoded += len(content).to_bytes(8, "big") + content
        assert digest_of(tmp_path) == "sha256:" + hashlib.sha256(encoded).hexdigest()

    def test_digest_covers_names_and_boundaries(self, tmp_path: Path) -> None:
        def digest(**contents: str) -> str:
            directory = tmp_path / str(len(list(tmp_path.iterdir())))
            directory.mkdir()
            for name, content in contents.items():
                (directory / name).write_text(content)
            return digest_of(directory)

        distinct = [digest(a="1", b="2"), digest(a="12", b=""), digest(a="2", b="1"), digest(c="1", d="2")]
        assert len(set(distinct)) == 4
        assert digest(b="2", a="1") == distinct[0]

    @staticmethod
    def _symlink(staged: Path) -> None:
        (staged / "weights").symlink_to("/etc/hostname")

    @staticmethod
    def _dangling(staged: Path) -> None:
        (staged / "weights").symlink_to("nowhere")

    @staticmethod
    def _subdirectory(staged: Path) -> None:
        (staged / "original").mkdir()

    @staticmethod
    def _fifo(staged: Path) -> None:
        os.mkfifo(staged / "pipe")

    @staticmethod
    def _not_utf8(staged: Path) -> None:
        (staged / os.fsdecode(b"\xff")).write_bytes(b"")

    @pytest.mark.parametrize("spoil", [_symlink, _dangling, _subdirectory, _fifo, _not_utf8])
    def test_only_plain_files_are_stored(self, store: Store, data_dir: Path, spoil: Callable[[Path], None]) -> None:
        with store.staging() as staged:
            (staged / "adapter_config.json").write_text("{}")
            spoil(staged)
            with pytest.raises(UnsupportedCheckpoint):
                store.publish(SHARED, "sql", staged, {})
        assert store.count(SHARED) == 0
        assert_consistent(store, data_dir)

    def test_an_adapter_has_files(self, store: Store) -> None:
        with store.staging() as staged, pytest.raises(UnsupportedCheckpoint, match="no files"):
            store.publish(SHARED, "sql", staged, {})

    def test_files_are_private(self, store: Store, data_dir: Path) -> None:
        with store.staging() as staged:
            (staged / "weights").write_bytes(b"1")
            (staged / "weights").chmod(0o666)
            staged.chmod(0o777)
            record = store.publish(SHARED, "sql", staged, {})
        assert {path.stat().st_mode & 0o777 for path in data_dir.rglob("*") if path.is_file()} == {0o600}
        assert {path.stat().st_mode & 0o777 for path in [data_dir, *data_dir.rglob("*")] if path.is_dir()} == {0o700}
        assert store.path(record.digest).is_dir()

    def test_staging_leaves_nothing_behind(self, store: Store, data_dir: Path) -> None:
        with store.staging() as one, store.staging() as other:
            assert one != other
            (one / "weights").write_bytes(b"1")
        with pytest.raises(KeyError), store.staging():
            raise KeyError
        assert_consistent(store, data_dir)

    def test_only_staged_directories_are_taken(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        with pytest.raises(AssertionError):
            store.publish(SHARED, "sql", tmp_path / "mine", {})

    @pytest.mark.parametrize("digest", ["", "sha256:", "a" * 64, "sha256:../../../../etc", "sha256:" + "A" * 64])
    def test_a_path_needs_a_digest(self, store: Store, digest: str) -> None:
        with pytest.raises(InvalidSelection):
            store.path(digest)

    def test_damaged_files_are_repaired_by_publishing_them_again(self, store: Store, data_dir: Path) -> None:
        record = publish(store, "sql", b"1")
        (store.path(record.digest) / "adapter_model.safetensors").write_bytes(b"2")
        assert publish(store, "sql", b"1", replace=True) == record
        assert_consistent(store, data_dir)


class TestVersions:
    def test_current_and_by_prefix(self, store: Store) -> None:
        first = publish(store, "sql", b"1", info={"n": 1})
        second = publish(store, "sql", b"2", info={"n": 2}, replace=True)
        assert store.version(SHARED, "sql").digest == second.digest
        assert store.version(SHARED, "sql", first.digest[: len("sha256:") + 8]).info == {"n": 1}
        assert store.version(SHARED, "sql", first.digest.upper().replace("SHA", "sha")) == first.versions[0]

    @pytest.mark.parametrize(
        "prefix", ["", "sha256:", "sha256:1234567", "12345678", "sha256:1234567g", "md5:12345678", "sha256:" + "0" * 65]
    )
    def test_malformed_prefix(self, store: Store, prefix: str) -> None:
        publish(store, "sql")
        with pytest.raises(InvalidSelection):
            store.version(SHARED, "sql", prefix)

    def test_ambiguous_prefix(self) -> None:
        versions = tuple(AdapterVersion("sha256:" + "0" * 63 + digit, 0.0, 0, {}) for digit in "12")
        record = AdapterRecord(SHARED, "sql", versions[0].digest, 0.0, 0.0, 0, {}, versions)
        with pytest.raises(InvalidSelection, match="2 versions"):
            record.version("sha256:00000000")
        assert record.version(versions[1].digest) == versions[1]

    def test_unknown(self, store: Store) -> None:
        publish(store, "other", b"2")
        record = publish(store, "sql", b"1")
        with pytest.raises(AdapterNotFound, match=record.digest):
            store.version(SHARED, "sql", store.get(SHARED, "other").digest)
        with pytest.raises(AdapterNotFound, match="no adapter is named 'x'"):
            store.version(SHARED, "x")

    def test_rollback(self, store: Store, data_dir: Path) -> None:
        first = publish(store, "sql", b"1", info={"n": 1})
        second = publish(store, "sql", b"2", info={"n": 2}, replace=True)
        back = store.rollback(SHARED, "sql", first.digest)
        assert (back.digest, back.info) == (first.digest, {"n": 1})
        assert digests(back) == [second.digest, first.digest]
        assert back.updated_at >= second.updated_at
        assert store.rollback(SHARED, "sql", first.digest) == back
        assert store.rollback(SHARED, "sql", second.digest).digest == second.digest
        assert_consistent(store, data_dir)

    def test_rollback_to_nothing(self, store: Store) -> None:
        record = publish(store, "sql", b"1")
        with pytest.raises(AdapterNotFound):
            store.rollback(SHARED, "sql", "sha256:00000000")
        with pytest.raises(AdapterNotFound):
            store.rollback(SHARED, "x", record.digest)
        publish(store, "sql", b"2", replace=True)
        if isinstance(store, SharedAdapterStore):
            store._blobs.remove(record.digest)
        for path in store.path(record.digest).iterdir():
            path.unlink()
        store.path(record.digest).rmdir()
        with pytest.raises(AdapterUnavailable, match="gone"):
            store.rollback(SHARED, "sql", record.digest)

    def test_all_versions_are_those_of_everybody(self, store: Store) -> None:
        expected = []
        for tenant, name, weights in [("a", "x", b"1"), ("b", "x", b"2"), ("a", "x", b"3"), ("a", "w", b"1")]:
            record = publish(store, name, weights, tenant=tenant, replace=True)
            expected.append((tenant, name, record.versions[0]))
        assert list(store.all_versions()) == expected


class TestDelete:
    def test_delete(self, store: Store, data_dir: Path) -> None:
        publish(store, "sql", b"1")
        record = publish(store, "sql", b"2", replace=True)
        store.activate(SHARED, "sql", "switch")
        assert store.delete(SHARED, "sql") == record
        assert store.active(SHARED) is None
        with pytest.raises(AdapterNotFound):
            store.get(SHARED, "sql")
        with pytest.raises(AdapterNotFound):
            store.delete(SHARED, "sql")
        assert blobs(data_dir) == set()

    def test_shared_files_go_with_their_last_name(self, store: Store, data_dir: Path) -> None:
        digest = publish(store, "sql", b"1").digest
        publish(store, "copy", b"1")
        publish(store, "sql", b"1", tenant="t")
        for tenant, name in [(SHARED, "sql"), ("t", "sql")]:
            store.delete(tenant, name)
            assert store.digest_in_use(digest)
            assert_consistent(store, data_dir)
        store.delete(SHARED, "copy")
        assert not store.digest_in_use(digest)
        assert blobs(data_dir) == set()


class TestActivation:
    def test_one_per_tenant(self, store: Store) -> None:
        for tenant, name in [(SHARED, "sql"), (SHARED, "style"), ("t", "sql")]:
            publish(store, name, tenant=tenant)
        assert store.active(SHARED) is None
        store.activate(SHARED, "sql", "switch")
        assert store.activate(SHARED, "style", "merge") == Activation(SHARED, "style", "merge", SHARED)
        store.activate("t", "sql", "switch")
        assert store.active(SHARED) == Activation(SHARED, "style", "merge", SHARED)
        assert store.active("t") == Activation("t", "sql", "switch", "t")

    def test_deactivate(self, store: Store) -> None:
        publish(store, "sql")
        assert not store.deactivate(SHARED, "sql")
        store.activate(SHARED, "sql", "switch")
        assert not store.deactivate(SHARED, "other")
        assert not store.deactivate("t", "sql")
        assert store.deactivate(SHARED, "sql")
        assert store.active(SHARED) is None

    def test_outlives_replacement_and_rollback(self, store: Store) -> None:
        first = publish(store, "sql", b"1")
        active = store.activate(SHARED, "sql", "merge")
        publish(store, "sql", b"2", replace=True)
        store.rollback(SHARED, "sql", first.digest)
        assert store.active(SHARED) == active

    def test_what_was_active_is_so_again(self, store: Store) -> None:
        publish(store, "sql")
        before = store.activate("t", "sql", "merge")
        for name in ("sql", "style"):
            publish(store, name, tenant="t")
        store.activate("t", "style", "switch")
        store.reactivate(before)
        assert store.active("t") == before == Activation("t", "sql", "merge", SHARED), "not the own one of that name"
        store.activate("t", "style", "switch")
        store.delete(SHARED, "sql")
        store.reactivate(before)
        assert store.active("t") is None

    def test_refused(self, store: Store) -> None:
        publish(store, "sql")
        with pytest.raises(AdapterNotFound):
            store.activate(SHARED, "x", "switch")
        with pytest.raises(InvalidSelection, match="switch, merge"):
            store.activate(SHARED, "sql", "blend")
        assert store.active(SHARED) is None


class TestList:
    def test_a_thousand_in_pages(self, store: Store) -> None:
        names = sorted(f"{prefix}{n}" for prefix in "Za" for n in range(500))
        ours, theirs = {}, {}
        for n, name in enumerate(names):
            ours[name] = [AdapterVersion(f"sha256:{digit}{n:063x}", float(n), n, {"n": n}) for digit in "12"]
            theirs[name] = [AdapterVersion(ours[name][1].digest, 0.0, 0, {})]
        fill(store, SHARED, ours)
        fill(store, "t", theirs)
        seen: list[str] = []
        after = None
        while True:
            page, after = store.list(SHARED, limit=64, after=after)
            assert all(len(record.versions) == 2 and record.digest[7] == "2" for record in page)
            assert [record.info["n"] for record in page] == [record.file_bytes for record in page]
            seen += [record.name for record in page]
            if after is None:
                break
            assert (len(page), after) == (64, seen[-1])
        assert seen == names
        assert store.count(SHARED) == 1000
        assert len(list(store.all_versions())) == 3000

    def test_edges(self, store: Store) -> None:
        assert store.list(SHARED) == ([], None)
        b, d = publish(store, "b"), publish(store, "d")
        assert store.list(SHARED, limit=2) == ([b, d], None)
        assert store.list(SHARED, limit=1) == ([b], "b")
        assert store.list(SHARED, after="c") == ([d], None)
        assert store.list(SHARED, after="d") == ([], None)
        assert store.list(SHARED, after="") == ([b, d], None)

    def test_refused(self, store: Store) -> None:
        with pytest.raises(InvalidSelection):
            store.list(SHARED, after="\ud800")
        with pytest.raises(ValueError, match="limit"):
            store.list(SHARED, limit=0)


class TestThreads:
    def test_one_of_many_wins_a_name(self, store: Store, data_dir: Path) -> None:
        barrier = threading.Barrier(8)

        def attempt(n: int) -> str | None:
            barrier.wait()
            try:
                return publish(store, "sql", b"%d" % n).digest
            except AdapterExists:
                return None

        with ThreadPoolExecutor(8) as threads:
            won = [digest for digest in threads.map(attempt, range(8)) if digest]
        assert won == [store.get(SHARED, "sql").digest]
        assert_consistent(store, data_dir)

    def test_publishing_and_deleting_the_same_files(self, store: Store, data_dir: Path) -> None:
        """The last name of a digest leaves while another one arrives: never a name without its files."""
        barrier = threading.Barrier(4)

        def churn(n: int) -> None:
            barrier.wait()
            for _ in range(8):
                record = publish(store, f"copy-{n}", b"same")
                assert digest_of(store.path(record.digest)) == record.digest
                store.delete(SHARED, f"copy-{n}")

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(churn, range(4)))
        assert store.count(SHARED) == 0
        assert_consistent(store, data_dir)

    def test_everything_at_once(self, store: Store) -> None:
        first = publish(store, "sql", b"1")
        second = publish(store, "sql", b"2", replace=True)
        barrier = threading.Barrier(4)

        def work(n: int) -> None:
            barrier.wait()
            for _ in range(25 if isinstance(store, AdapterStore) else 3):
                assert store.activate(SHARED, "sql", "switch").name == "sql"
                assert store.rollback(SHARED, "sql", first.digest).digest == first.digest
                assert store.rollback(SHARED, "sql", second.digest).digest == second.digest
                assert store.get(SHARED, "sql").versions == second.versions
                store.deactivate(SHARED, "sql")

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
        assert store.active(SHARED) is None


def test_the_store_needs_neither_torch_nor_the_service() -> None:
    loaded = "import sys, adapters.store; print(*sys.modules)"
    root = Path(adapters.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", loaded], cwd=root, capture_output=True, text=True, check=True)
    assert not {"torch", "safetensors", "numpy", "service"} & set(run.stdout.split())
