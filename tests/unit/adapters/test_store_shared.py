"""Many servers on one store: who sees what and when, who wins, and what is left when something fails in between."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import adapters
from adapters.errors import AdapterExists, AdapterNotFound, StoreCorrupt, StoreUnavailable
from adapters.store import Activation, digest_of
from adapters.store.shared import SharedAdapterStore, open_objects
from adapters.store.shared import manifests as manifests_module
from adapters.store.shared.keys import blob_prefix, manifest_key
from adapters.store.shared.local import LocalObjects
from adapters.store.shared.objects import ObjectStore
from tests.unit.adapters.shared_support import Faulty, shared, until
from tests.unit.adapters.store_support import SHARED, publish

ROOT = Path(adapters.__file__).parents[1]
Opener = Callable[..., SharedAdapterStore]


@pytest.fixture
def replica(tmp_path: Path, objects: ObjectStore) -> Iterator[Opener]:
    """Opens another replica, with a data directory of its own, on the same objects."""
    with ExitStack() as opened:
        count = 0

        def replica(on: ObjectStore = objects, **options: object) -> SharedAdapterStore:
            nonlocal count
            count += 1
            store = shared(on, tmp_path / f"replica-{count}", **options)
            opened.callback(store.close)
            return store

        yield replica


class TestReplicas:
    def test_each_sees_what_the_other_does(self, replica: Opener) -> None:
        one, other = replica(), replica()
        record = publish(one, "sql", b"1", info={"n": 1})
        with pytest.raises(AdapterNotFound):
            other.get(SHARED, "sql")
        other.refresh()
        assert other.get(SHARED, "sql") == record
        assert digest_of(other.fetch(record.digest)) == record.digest
        other.activate(SHARED, "sql", "merge")
        one.refresh()
        assert one.active(SHARED) == Activation(SHARED, "sql", "merge", SHARED)
        newer = publish(other, "sql", b"2")
        one.refresh()
        assert one.get(SHARED, "sql") == newer
        one.delete(SHARED, "sql")
        other.refresh()
        assert (other.count(SHARED), other.active(SHARED)) == (0, None)

    def test_within_two_seconds(self, replica: Opener) -> None:
        one, other = replica(refresh_s=1.0), replica(refresh_s=1.0)
        for n in range(3):
            digest = publish(one, "sql", b"%d" % n).digest
            assert (
                until(lambda digest=digest: other.count(SHARED) > 0 and other.get(SHARED, "sql").digest == digest) < 2
            )
        one.activate(SHARED, "sql", "switch")
        assert until(lambda: other.active(SHARED) is not None) < 2
        one.delete(SHARED, "sql")
        assert until(lambda: other.count(SHARED) == 0) < 2

    def test_what_is_refused_is_decided_on_the_latest(self, replica: Opener) -> None:
        one, other = replica(), replica()
        publish(one, "sql", b"1")
        with other.staging() as staged:
            (staged / "weights").write_bytes(b"2")
            with pytest.raises(AdapterExists, match="other files"):
                other.publish(SHARED, "sql", staged, {})
        one.delete(SHARED, "sql")
        with pytest.raises(AdapterNotFound):
            other.delete(SHARED, "sql")
        with pytest.raises(AdapterNotFound):
            other.activate("t", "sql", "switch")

    def test_another_adapter_of_the_name_is_not_the_default(self, replica: Opener) -> None:
        one, other = replica(), replica()
        publish(one, "sql", b"1")
        other.activate("t", "sql", "switch")
        one.delete(SHARED, "sql")
        publish(one, "sql", b"1")
        other.refresh()
        assert other.visible("t", "sql").name == "sql"
        assert other.active("t") is None

    def test_what_one_deletes_leaves_the_others_disk_and_is_told(self, replica: Opener) -> None:
        one, other = replica(), replica()
        kept, gone = publish(one, "kept", b"1").digest, publish(one, "gone", b"2").digest
        other.refresh()
        told: list[str] = []
        other.listen(told.extend)
        for digest in (kept, gone):
            other.fetch(digest)
        one.delete(SHARED, "gone")
        other.refresh()
        assert told == [gone]
        assert other.path(kept).is_dir()
        assert not other.path(gone).exists()
        with pytest.raises(AdapterNotFound, match="deleted"):
            other.fetch(gone)

    def test_a_rollback_reaches_the_others(self, replica: Opener) -> None:
        one, other = replica(), replica()
        first = publish(one, "sql", b"1")
        publish(one, "sql", b"2")
        other.rollback(SHARED, "sql", first.digest)
        one.refresh()
        assert one.get(SHARED, "sql").digest == first.digest

    def test_a_refresh_reads_only_what_has_changed(self, replica: Opener, objects: ObjectStore) -> None:
        seen = Faulty(objects)
        one, other = replica(), replica(seen)
        for tenant in ("a", "b", "c"):
            publish(one, "sql", tenant=tenant)
        other.refresh()
        publish(one, "more", tenant="b")
        seen.calls.clear()
        other.refresh()
        assert seen.calls == [("list", "tenants"), ("get", "tenants/b.json")]


class TestWriters:
    def test_fifty_at_once_lose_nothing(self, replica: Opener) -> None:
        stores = [replica() for _ in range(5)]

        def write(n: int) -> None:
            publish(stores[n % 5], f"adapter-{n}", b"%d" % (n % 7))

        with ThreadPoolExecutor(50) as threads:
            list(threads.map(write, range(50)))
        for store in stores:
            store.refresh()
            assert [name for name, _ in store.names(SHARED)] == sorted(f"adapter-{n}" for n in range(50))
        assert stores[0]._manifests.of(SHARED).generation == 50

    def test_one_of_many_gets_the_name(self, replica: Opener) -> None:
        stores = [replica() for _ in range(4)]

        def attempt(n: int) -> str | None:
            with stores[n].staging() as staged:
                (staged / "weights").write_bytes(b"%d" % n)
                try:
                    return stores[n].publish(SHARED, "sql", staged, {}).digest
                except AdapterExists:
                    return None

        with ThreadPoolExecutor(4) as threads:
            won = [digest for digest in threads.map(attempt, range(4)) if digest]
        stores[0].refresh()
        assert won == [stores[0].get(SHARED, "sql").digest]

    def test_two_processes(self, tmp_path: Path) -> None:
        """Of a directory, whose lock is between processes. Each publishes, replaces and deletes names of its own."""
        url = f"file://{tmp_path}/objects"
        program = [sys.executable, "-m", "tests.unit.adapters.shared_writer", url]
        running = [
            subprocess.Popen([*program, str(tmp_path / f"data-{each}"), each, "25"], cwd=ROOT) for each in ("a", "b")
        ]
        assert [process.wait(120) for process in running] == [0, 0]
        store = shared(open_objects(url), tmp_path / "data")
        assert [name for name, _ in store.names(SHARED)] == sorted(f"{each}-{n}" for each in "ab" for n in range(25))
        assert store._manifests.of(SHARED).generation == 2 * 25 * 3
        store.close()


class TestUncertainty:
    """A put that got no answer: it has happened, it has not, or it happens later."""

    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(manifests_module, "_LONGEST_PAUSE_S", 0.02)

    def test_it_has_happened(self, replica: Opener, objects: ObjectStore) -> None:
        faulty = Faulty(objects)
        store = replica(faulty)
        faulty.after = once("put", StoreUnavailable("timed out"))
        record = publish(store, "sql", b"1")
        other = replica()
        assert other.get(SHARED, "sql") == record == store.get(SHARED, "sql")
        assert other._manifests.of(SHARED).generation == 1

    def test_it_has_not(self, replica: Opener, objects: ObjectStore) -> None:
        faulty = Faulty(objects)
        store = replica(faulty)
        faulty.before = once("put", StoreUnavailable("timed out"))
        record = publish(store, "sql", b"1")
        assert replica().get(SHARED, "sql") == record

    def test_it_has_happened_and_somebody_wrote_after_it(self, replica: Opener, objects: ObjectStore) -> None:
        """Without the writes' names this would be AdapterExists, for one's own adapter."""
        faulty, other = Faulty(objects), replica()
        store = replica(faulty)

        def fail(call: str, key: str) -> None:
            if call == "put":
                faulty.after = lambda call, key: None
                publish(other, "style", b"2")
                raise StoreUnavailable("timed out")

        faulty.after = fail
        with store.staging() as staged:
            (staged / "weights").write_bytes(b"1")
            store.publish(SHARED, "sql", staged, {})
        other.refresh()
        assert [name for name, _ in other.names(SHARED)] == ["sql", "style"]

    def test_it_happens_while_it_is_tried_again(self, replica: Opener, objects: ObjectStore) -> None:
        faulty = Faulty(objects)
        store = replica(faulty)
        late: list[Callable[[], None]] = []
        put = faulty.put

        def delayed(key: str, data: bytes, *, over: str | None) -> str:
            if not late:
                late.append(lambda: void(objects.put(key, data, over=over)))
                raise StoreUnavailable("timed out")
            late[0]()
            return put(key, data, over=over)

        faulty.put = delayed  # type: ignore[method-assign]
        record = publish(store, "sql", b"1")
        other = replica()
        assert other.get(SHARED, "sql") == record
        assert other._manifests.of(SHARED).generation == 1, "once"

    def test_nobody_ever_says(self, replica: Opener, objects: ObjectStore) -> None:
        faulty = Faulty(objects)
        store = replica(faulty)
        store._manifests._write_timeout_s = 0.1

        def fail(call: str, key: str) -> None:
            if call == "put":
                faulty.before = always(StoreUnavailable("no route"))
                raise StoreUnavailable("timed out")

        faulty.after = fail
        with pytest.raises(StoreUnavailable, match="is not known: look at the adapter"):
            publish(store, "sql", b"1")
        faulty.before = faulty.after = lambda call, key: None
        store.refresh()
        assert store.count(SHARED) == 1

    def test_a_conflict_is_tried_again_on_what_is_there_now(self, replica: Opener, objects: ObjectStore) -> None:
        faulty, other = Faulty(objects), replica()
        store = replica(faulty)

        def intrude(call: str, key: str) -> None:
            if call == "put":
                faulty.before = lambda call, key: None
                publish(other, "style", b"2")

        faulty.before = intrude
        publish(store, "sql", b"1")
        assert [name for name, _ in store.names(SHARED)] == ["sql", "style"]


class TestDownAndBack:
    def test_what_is_known_is_served_and_changes_are_refused(self, replica: Opener, objects: ObjectStore) -> None:
        faulty = Faulty(objects)
        store = replica(faulty, refresh_s=0.01)
        record = publish(store, "sql", b"1")
        elsewhere = publish(replica(), "style", b"2")
        until(lambda: store.count(SHARED) == 2)
        faulty.before = always(StoreUnavailable("down"))
        errors = store.health().errors
        until(lambda: store.health().errors > errors)
        assert store.get(SHARED, "sql") == record
        assert digest_of(store.fetch(record.digest)) == record.digest
        with pytest.raises(StoreUnavailable):
            store.fetch(elsewhere.digest)
        with pytest.raises(StoreUnavailable):
            publish(store, "more")
        with pytest.raises(StoreUnavailable):
            store.delete(SHARED, "sql")
        assert store.count(SHARED) == 2
        age = store.health().refresh_age_s
        faulty.before = lambda call, key: None
        until(lambda: store.health().refresh_age_s < age)
        assert digest_of(store.fetch(elsewhere.digest)) == elsewhere.digest
        publish(store, "more")

    def test_nobody_waits_for_a_store_that_is_known_to_be_away(self, replica: Opener, objects: ObjectStore) -> None:
        faulty = Faulty(objects)
        store = replica(faulty)
        digest = publish(replica(), "sql").digest
        store.refresh()
        faulty.before = always(StoreUnavailable("down"))
        with pytest.raises(StoreUnavailable):
            store.refresh()
        faulty.calls.clear()
        for attempt in (
            lambda: void(publish(store, "style")),
            lambda: void(store.delete(SHARED, "sql")),
            lambda: void(store.activate(SHARED, "sql", "switch")),
            lambda: void(store.deactivate(SHARED, "sql")),
            lambda: void(store.rollback(SHARED, "sql", digest)),
            lambda: void(store.fetch(digest)),
        ):
            with pytest.raises(StoreUnavailable, match="down"):
                attempt()
        assert faulty.calls == []
        faulty.before = lambda call, key: None
        store.refresh()
        assert digest_of(store.fetch(digest)) == digest

    def test_a_store_that_does_not_answer_is_not_opened(self, replica: Opener, objects: ObjectStore) -> None:
        faulty = Faulty(objects)
        faulty.before = always(StoreUnavailable("down"))
        with pytest.raises(StoreUnavailable):
            replica(faulty)

    def test_an_emptied_store_is_no_deletion(self, replica: Opener, objects: ObjectStore) -> None:
        store = replica()
        record = publish(store, "sql")
        objects.delete(manifest_key(SHARED))
        with pytest.raises(StoreCorrupt, match="put it back"):
            store.refresh()
        with pytest.raises(StoreCorrupt):
            publish(store, "style")
        assert store.get(SHARED, "sql") == record

    @pytest.mark.parametrize(
        "spoilt",
        ["newer", "garbage", "another's", "half", "no generation", "below 0", "no time", "never", "no mode", "twice"],
    )
    def test_a_manifest_that_cannot_be_read_is_kept(self, replica: Opener, objects: ObjectStore, spoilt: str) -> None:
        store = replica()
        record = publish(store, "sql", tenant="a")
        content = objects.get(manifest_key("a"))
        assert content is not None
        newer = {**json.loads(content.data), "schema": 2}
        other = {**json.loads(content.data), "tenant": "b"}
        text = content.data.decode()
        data = {
            "no generation": text.replace('"generation":1', '"generation":1e999').encode(),
            "below 0": text.replace('"generation":1', '"generation":-1').encode(),
            "no time": re.sub('"updated_at":[0-9.]+', '"updated_at":NaN', text).encode(),
            "never": re.sub('"updated_at":[0-9.]+', '"updated_at":1e999', text).encode(),
            "no mode": text.replace(
                '"active":null', '"active":{"owner":"a","name":"sql","mode":"melt","id":"1"}'
            ).encode(),
            "twice": re.sub(r'"versions":\[(.*?\})\]', r'"versions":[\1,\1]', text).encode(),
            "newer": json.dumps(newer).encode(), "garbage": b"\xff[", "another's": json.dumps(other).encode(),
            "half": content.data[: len(content.data) // 2],
        }[spoilt]  # fmt: skip
        etag = objects.put(manifest_key("a"), data, over=content.etag)
        for attempt in (store.refresh, lambda: void(publish(store, "sql", b"2", tenant="a")), lambda: void(replica())):
            with pytest.raises(StoreCorrupt):
                attempt()
        assert store.get("a", "sql") == record
        left = objects.get(manifest_key("a"))
        assert left is not None
        assert (left.data, left.etag) == (data, etag), "not overwritten"
        publish(store, "sql", tenant="b")


class TestFiles:
    def test_fetched_once_however_many_ask(self, replica: Opener, objects: ObjectStore) -> None:
        digest = publish(replica(), "sql").digest
        seen = Faulty(objects)
        store = replica(seen)
        with ThreadPoolExecutor(8) as threads:
            assert len(set(threads.map(lambda _: store.fetch(digest), range(8)))) == 1
        assert [call for call, _ in seen.calls].count("get_file") == 2

    def test_where_files_are_is_nobodys_to_read_but_by_name(self, replica: Opener, objects: ObjectStore) -> None:
        """What `--allow-source` never covers: the copies, what is staged, and a directory that holds the store."""
        store = replica()
        digest = publish(store, "sql").digest
        private = [store.fetch(digest), store._cache.tmp]
        if isinstance(objects, LocalObjects):
            private += [path for path in objects.root.rglob("*") if path.is_file()]
            assert len(private) > 4
        assert all(any(path.is_relative_to(each) for each in store.directories) for path in private)

    def test_damaged_in_the_store(self, replica: Opener, objects: ObjectStore, tmp_path: Path) -> None:
        one = replica()
        digest = publish(one, "sql").digest
        (tmp_path / "other").write_bytes(b"weighty")
        objects.put_file(f"{blob_prefix(digest)}/adapter_model.safetensors", tmp_path / "other")
        other = replica()
        with pytest.raises(StoreUnavailable, match="not those that were uploaded"):
            other.fetch(digest)
        assert not other.path(digest).exists()
        assert one.fetch(digest), "its own copy is good"
        publish(one, "sql")
        assert digest_of(other.fetch(digest)) == digest

    def test_missing_from_the_store(self, replica: Opener, objects: ObjectStore) -> None:
        digest = publish(replica(), "sql").digest
        other = replica()
        other._blobs.remove(digest)
        with pytest.raises(StoreUnavailable, match="missing"):
            other.fetch(digest)

    def test_damaged_here(self, replica: Opener) -> None:
        store = replica()
        digest = publish(store, "sql").digest
        (store.path(digest) / "adapter_config.json").write_text("[]")
        with store.reading(digest) as directory:
            assert digest_of(directory) == digest

    def test_the_least_recently_used_leave(self, replica: Opener) -> None:
        publisher = replica()
        digests = [publish(publisher, f"a{n}", bytes([n]) * 1000).digest for n in range(5)]
        store = replica(cache_bytes=3500)
        with store.reading(digests[0]) as held:
            for digest in digests[1:]:
                store.fetch(digest)
            assert held.is_dir()
            assert digest_of(held) == digests[0]
        here = [digest for digest in digests if store.path(digest).is_dir()]
        assert {digests[0], digests[4]} <= set(here)
        assert len(here) <= 3
        assert store._cache.size <= 3500

    def test_one_machines_processes_share_their_copies(self, objects: ObjectStore, tmp_path: Path) -> None:
        digest = publish(one := shared(objects, tmp_path / "data"), "sql").digest
        seen = Faulty(objects)
        other = shared(seen, tmp_path / "data", cache_bytes=1)
        with one.reading(digest) as directory:
            assert other.fetch(digest) == directory
            assert not other._cache.drop(digest), "it is being read"
            assert directory.is_dir()
        assert other._cache.drop(digest)
        assert [call for call, _ in seen.calls].count("get_file") == 0
        one.close()
        other.close()

    def test_what_a_killed_process_left_is_swept(self, objects: ObjectStore, tmp_path: Path) -> None:
        first = shared(objects, tmp_path / "data")
        alive = first._cache.tmp
        (tmp_path / "data" / "shared" / "tmp" / "dead").mkdir()
        second = shared(objects, tmp_path / "data")
        assert sorted((tmp_path / "data" / "shared" / "tmp").iterdir()) == sorted([alive, second._cache.tmp])
        first.close()
        second.close()

    def test_whether_it_was_collected_is_not_known(self, replica: Opener, objects: ObjectStore) -> None:
        """The name is there: "try again" would be answered with a conflict."""
        faulty = Faulty(objects)
        store = replica(faulty)

        def silent(call: str, key: str) -> None:
            if call == "list" and key.startswith("blobs"):
                raise StoreUnavailable("does not answer; try again")

        faulty.before = silent
        with pytest.raises(StoreUnavailable, match="published, but whether"):
            publish(store, "sql")
        assert store.get(SHARED, "sql")

    def test_collected_while_it_was_published(self, replica: Opener, objects: ObjectStore) -> None:
        """The collector looked before the manifest was written, and removes after."""
        faulty = Faulty(objects)
        store = replica(faulty)

        def collect(call: str, key: str) -> None:
            if call == "put":
                faulty.after = lambda call, key: None
                for info in list(objects.list("blobs/sha256")):
                    objects.delete(info.key)

        faulty.after = collect
        digest = publish(store, "sql").digest
        assert digest_of(replica().fetch(digest)) == digest


def once(call: str, error: Exception) -> Callable[[str, str], None]:
    left = [error]

    def fail(called: str, key: str) -> None:
        if called == call and left:
            raise left.pop()

    return fail


def always(error: Exception) -> Callable[[str, str], None]:
    def fail(call: str, key: str) -> None:
        raise error

    return fail


def void(value: object) -> None:
    """For a lambda that answers nothing."""
