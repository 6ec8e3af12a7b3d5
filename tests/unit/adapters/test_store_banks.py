"""Equal banks are stored once, for as long as an adapter has them; what an adapter is does not depend on it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from adapters.errors import AdapterExists, StorageFull, StoreError, UnsupportedCheckpoint
from adapters.split_file import BANK_FILE, WEIGHTS_FILE, is_split
from adapters.store import AdapterStore, digest_of
from adapters.store import banks as banks_module
from adapters.store.inventory import Problem
from adapters.store.repair import examine, repair
from tests.unit.adapters.store_support import (
    SHARED,
    assert_consistent,
    banks,
    flip_a_bit,
    publish,
    uploaded,
    weights_with,
)

BANK = b"a bank that a family shares" * 1000
OTHER = b"another bank" * 1000
NAME = hashlib.sha256(BANK).hexdigest()
ONE, TWO, THREE = (weights_with(BANK, own=f"adapter {n}".encode() * 500) for n in range(3))
ALONE = weights_with(OTHER, own=b"alone" * 500)


def weights_of(store: AdapterStore, name: str) -> Path:
    return store.path(store.get(SHARED, name).digest) / WEIGHTS_FILE


def bank_of(store: AdapterStore, name: str) -> Path:
    return store.path(store.get(SHARED, name).digest) / BANK_FILE


def refuse_links(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)


class TestSharing:
    def test_equal_banks_are_one_file(self, store: AdapterStore, data_dir: Path) -> None:
        for name, weights in (("one", ONE), ("two", TWO), ("alone", ALONE)):
            publish(store, name, weights)
        assert banks(data_dir) == {NAME: 2, hashlib.sha256(OTHER).hexdigest(): 1}
        assert bank_of(store, "one").samefile(bank_of(store, "two"))
        assert (data_dir / "banks" / "sha256" / NAME).read_bytes() == BANK
        assert BANK not in weights_of(store, "one").read_bytes()
        assert_consistent(store, data_dir)

    def test_an_adapter_stays_what_it_was(self, store: AdapterStore, tmp_path: Path) -> None:
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "adapter_config.json").write_text("{}")
        (tmp_path / "plain" / WEIGHTS_FILE).write_bytes(ONE)
        record = publish(store, "one", ONE)
        assert record.digest == digest_of(tmp_path / "plain") == digest_of(store.path(record.digest))
        assert record.file_bytes == len(ONE) + len("{}")
        assert uploaded(weights_of(store, "one")) == ONE

    def test_versions_and_tenants_share(self, store: AdapterStore, data_dir: Path) -> None:
        publish(store, "sql", ONE)
        publish(store, "sql", TWO)
        publish(store, "sql", ONE, tenant="acme")
        publish(store, "other", THREE, tenant="acme")
        assert banks(data_dir) == {NAME: 3}

    def test_many_at_once(self, store: AdapterStore, data_dir: Path) -> None:
        """Published and deleted from many threads, nothing is lost and nothing is left."""
        together = threading.Barrier(4)

        def come_and_go(worker: int) -> None:
            for n in range(12):
                together.wait(30)
                publish(store, f"adapter-{worker}", weights_with(BANK, own=b"%d %d" % (worker, n) * 500))
                assert uploaded(bank_of(store, f"adapter-{worker}")) == BANK
                if n % 3:
                    store.delete(SHARED, f"adapter-{worker}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(come_and_go, range(4)))
        assert store.count(SHARED) == 0
        assert banks(data_dir) == {}
        assert_consistent(store, data_dir)

    @pytest.mark.parametrize("weights", [b"junk", weights_with(b"", own=b"x"), b""])
    def test_what_has_no_bank_is_stored_as_it_is(self, store: AdapterStore, data_dir: Path, weights: bytes) -> None:
        publish(store, "odd", weights)
        assert weights_of(store, "odd").read_bytes() == weights
        assert not bank_of(store, "odd").exists()
        assert banks(data_dir) == {}

    def test_a_bank_that_ends_beyond_the_file(self, store: AdapterStore) -> None:
        publish(store, "cut", ONE[:-6000])
        assert weights_of(store, "cut").read_bytes() == ONE[:-6000]

    def test_large_weights_are_stored_whole(self, store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(banks_module, "READ_AT_ONCE", len(ONE) - 1)
        publish(store, "one", ONE)
        assert weights_of(store, "one").read_bytes() == ONE

    def test_nobody_brings_a_bank_of_his_own(self, store: AdapterStore, data_dir: Path) -> None:
        with store.staging() as staged:
            (staged / WEIGHTS_FILE).write_bytes(b"weights")
            (staged / BANK_FILE).write_bytes(b"bank")
            with pytest.raises(UnsupportedCheckpoint, match="no file of an adapter may be called"):
                store.publish(SHARED, "sql", staged, {})
        assert_consistent(store, data_dir)


class TestLeaving:
    def test_a_bank_goes_with_its_last_adapter(self, store: AdapterStore, data_dir: Path) -> None:
        publish(store, "one", ONE)
        publish(store, "two", TWO)
        store.delete(SHARED, "one")
        assert banks(data_dir) == {NAME: 1}
        assert uploaded(weights_of(store, "two")) == TWO
        store.delete(SHARED, "two")
        assert banks(data_dir) == {}

    def test_with_its_last_version(self, store: AdapterStore, data_dir: Path) -> None:
        for weights in (ONE, TWO, ALONE, weights_with(OTHER)):
            publish(store, "sql", weights)  # two versions are kept
        assert banks(data_dir) == {hashlib.sha256(OTHER).hexdigest(): 2}

    def test_with_an_upload_that_is_refused(self, store: AdapterStore, data_dir: Path) -> None:
        publish(store, "sql", ALONE)
        with store.staging() as staged:
            (staged / WEIGHTS_FILE).write_bytes(ONE)
            with pytest.raises(AdapterExists):
                store.publish(SHARED, "sql", staged, {})
        assert banks(data_dir) == {hashlib.sha256(OTHER).hexdigest(): 1}
        assert_consistent(store, data_dir)

    def test_the_same_upload_again(self, store: AdapterStore, data_dir: Path) -> None:
        publish(store, "one", ONE)
        publish(store, "one", ONE)
        assert banks(data_dir) == {NAME: 1}

    def test_one_that_was_left_is_swept_up_at_the_next_start(self, store: AdapterStore, data_dir: Path) -> None:
        record = publish(store, "one", ONE)
        publish(store, "alone", ALONE)
        store.close()
        folder = data_dir / "banks" / "sha256"
        (folder / ("0" * 64)).write_bytes(b"left")
        (folder / "lost+found").mkdir()
        (folder / ("1" * 64)).symlink_to(folder / NAME)
        os.rename(store.path(record.digest), data_dir / "tmp" / "removed-1")
        shutil.copytree(data_dir / "tmp" / "removed-1", data_dir / "blobs" / "sha256" / ("e" * 64))
        os.link(folder / NAME, data_dir / "tmp" / "bank-1")
        with closing(AdapterStore(data_dir)):
            found = {path.name for path in folder.iterdir()}
        assert found == {"lost+found", "1" * 64, hashlib.sha256(OTHER).hexdigest()}

    def test_of_a_copy_without_links_every_adapter_keeps_its_own(self, store: AdapterStore, tmp_path: Path) -> None:
        """As a backup may be restored."""
        publish(store, "one", ONE)
        publish(store, "two", TWO)
        store.close()
        shutil.copytree(tmp_path / "data", tmp_path / "restored")
        with closing(AdapterStore(tmp_path / "restored")) as restored:
            assert banks(tmp_path / "restored") == {}
            assert [uploaded(weights_of(restored, name)) for name in ("one", "two")] == [ONE, TWO]
            publish(restored, "three", THREE)
            restored.delete(SHARED, "one")
            assert banks(tmp_path / "restored") == {NAME: 1}
        assert repair(tmp_path / "restored").findings == ()


class TestDamage:
    def test_a_damaged_bank_damages_all_that_have_it(self, store: AdapterStore, data_dir: Path) -> None:
        records = [publish(store, "one", ONE), publish(store, "two", TWO), publish(store, "alone", ALONE)]
        flip_a_bit(bank_of(store, "one"))
        assert [digest_of(store.path(record.digest)) == record.digest for record in records] == [False, False, True]

    def test_it_is_never_linked_to_and_replaced_by_the_next_upload(self, store: AdapterStore, data_dir: Path) -> None:
        publish(store, "one", ONE)
        damaged = bank_of(store, "one")
        flip_a_bit(damaged)
        publish(store, "two", TWO)
        assert not bank_of(store, "two").samefile(damaged)
        assert uploaded(weights_of(store, "two")) == TWO
        assert banks(data_dir) == {NAME: 1}
        publish(store, "one", ONE)  # mends it
        assert uploaded(weights_of(store, "one")) == ONE
        assert banks(data_dir) == {NAME: 2}
        assert_consistent(store, data_dir)

    @pytest.mark.parametrize("kind", ["link", "shorter", "empty"])
    def test_what_has_a_banks_name_is_not_trusted(
        self, store: AdapterStore, data_dir: Path, tmp_path: Path, kind: str
    ) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(BANK)
        planted = data_dir / "banks" / "sha256" / NAME
        if kind == "link":
            planted.symlink_to(secret)
        else:
            planted.write_bytes(BANK[:-1] if kind == "shorter" else b"")
        publish(store, "one", ONE)
        assert uploaded(weights_of(store, "one")) == ONE
        assert not planted.is_symlink()
        assert planted.samefile(bank_of(store, "one"))
        assert secret.stat().st_nlink == 1

    @pytest.mark.parametrize("damage", ["flipped", "gone", "a link", "shorter"])
    def test_the_doctor_finds_it(self, store: AdapterStore, data_dir: Path, damage: str) -> None:
        publish(store, "sql", ALONE)
        record = publish(store, "sql", ONE)
        bank = bank_of(store, "sql")
        store.close()
        if damage == "flipped":
            flip_a_bit(bank)
        elif damage == "shorter":
            os.truncate(bank, 100)
        else:
            bank.unlink()
            if damage == "a link":
                bank.symlink_to(data_dir / "banks" / "sha256" / NAME)
        report = repair(data_dir)
        assert (Problem.DAMAGED, "sql") in [(finding.problem, finding.subject) for finding in report.found]
        assert report.remaining == ()
        assert (data_dir / "quarantine" / f"{record.digest[7:]}.1").is_dir()
        with closing(AdapterStore(data_dir)) as reopened:
            assert uploaded(weights_of(reopened, "sql")) == ALONE
            publish(reopened, "sql", ONE)
            assert uploaded(weights_of(reopened, "sql")) == ONE

    def test_the_doctor_removes_orphans_and_keeps_what_quarantine_has(
        self, store: AdapterStore, data_dir: Path
    ) -> None:
        record = publish(store, "one", ONE)
        store.close()
        (data_dir / "banks" / "sha256" / ("0" * 64)).write_bytes(b"left")
        flip_a_bit(store.path(record.digest) / WEIGHTS_FILE)
        assert (Problem.LEFTOVER, f"banks/sha256/{'0' * 64}") in [
            (finding.problem, finding.subject) for finding in examine(data_dir).found
        ]
        assert repair(data_dir).remaining == ()
        assert banks(data_dir) == {NAME: 1}
        assert (data_dir / "quarantine" / f"{record.digest[7:]}.1" / BANK_FILE).read_bytes() == BANK


class TestWithoutLinks:
    @pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
    def test_weights_are_stored_whole(
        self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        with monkeypatch.context() as patch:
            refuse_links(patch, number)
            before = publish(store, "one", ONE)
        assert weights_of(store, "one").read_bytes() == ONE
        assert not is_split(weights_of(store, "one"))
        assert banks(data_dir) == {}
        assert_consistent(store, data_dir)
        publish(store, "two", TWO)
        assert publish(store, "one", ONE) == before, "the files there are as good"
        assert banks(data_dir) == {NAME: 1}

    def test_also_beside_a_bank_that_is_there(
        self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(store, "one", ONE)
        with monkeypatch.context() as patch:
            refuse_links(patch, errno.EPERM)
            publish(store, "two", TWO)
        assert weights_of(store, "two").read_bytes() == TWO
        assert banks(data_dir) == {NAME: 1}

    def test_a_bank_that_can_take_no_more_links_is_followed_by_another(
        self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(store, "one", ONE)
        first, link = bank_of(store, "one").stat().st_ino, os.link

        def at_most_one(source: Path, target: Path, **options: bool) -> None:
            if os.stat(source).st_ino == first:
                raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
            link(source, target, **options)

        monkeypatch.setattr(os, "link", at_most_one)
        publish(store, "two", TWO)
        publish(store, "three", THREE)
        assert banks(data_dir) == {NAME: 2}
        assert bank_of(store, "two").samefile(bank_of(store, "three"))
        assert [uploaded(weights_of(store, name)) for name in ("one", "two", "three")] == [ONE, TWO, THREE]
        store.delete(SHARED, "one")
        assert_consistent(store, data_dir)

    def test_refused_after_the_first_link(
        self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However far it came, whole weights have no bank beside them."""
        real = banks_module.files.fsync_directory

        def refuse(directory: Path) -> None:
            if directory.parent.name == "banks":
                raise PermissionError(errno.EPERM, "not permitted")
            real(directory)

        monkeypatch.setattr(banks_module.files, "fsync_directory", refuse)
        publish(store, "one", ONE)
        assert weights_of(store, "one").read_bytes() == ONE
        assert not bank_of(store, "one").exists()
        assert banks(data_dir) == {}
        assert_consistent(store, data_dir)

    @pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
    def test_a_disk_that_fails_is_something_else(
        self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        with monkeypatch.context() as patch:
            refuse_links(patch, number)
            with pytest.raises(StoreError, match="cannot use its files"):
                publish(store, "one", ONE)
        assert store.count(SHARED) == 0
        assert_consistent(store, data_dir)

    def test_a_full_disk_leaves_the_staged_weights_as_they_were(
        self, store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with store.staging() as staged:
            (staged / WEIGHTS_FILE).write_bytes(ONE)
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", full)
                with pytest.raises(StorageFull):
                    store.publish(SHARED, "one", staged, {})
            assert [path.name for path in staged.iterdir()] == [WEIGHTS_FILE]
            store.publish(SHARED, "one", staged, {})
        assert banks(data_dir) == {NAME: 1}
        assert_consistent(store, data_dir)


def test_everything_reaches_the_disk_before_the_row(
    store: AdapterStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []

    def recorded(name: str, inode_of: Callable[..., int]) -> None:
        real = getattr(os, name)

        def call(*args: object, **options: object) -> object:
            events.append((name, inode_of(*args)))
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)

    recorded("fsync", lambda descriptor: os.fstat(descriptor).st_ino)
    for name in ("link", "rename", "replace"):
        recorded(name, lambda source, target: os.stat(source).st_ino)
    store._database.connection.set_trace_callback(lambda sql: events.append(("commit", 0)) if sql == "COMMIT" else None)
    blob = store.path(publish(store, "one", ONE).digest)
    folder, bank = data_dir / "banks" / "sha256", (blob / BANK_FILE).stat().st_ino
    order = [
        ("fsync", bank),
        ("link", bank),
        ("rename", bank),
        ("fsync", folder.stat().st_ino),
        ("replace", (blob / WEIGHTS_FILE).stat().st_ino),
        *(("fsync", path.stat().st_ino) for path in sorted(blob.iterdir()) if path.name != BANK_FILE),
        ("fsync", blob.stat().st_ino),
        ("rename", blob.stat().st_ino),
        ("fsync", blob.parent.stat().st_ino),
        ("commit", 0),
    ]
    assert events == order


def test_blobs_of_earlier_releases_are_read_as_they_are(store: AdapterStore, data_dir: Path) -> None:
    record = publish(store, "one", ONE)
    store.close()
    blob = store.path(record.digest)
    (blob / BANK_FILE).unlink()
    (blob / WEIGHTS_FILE).write_bytes(ONE)
    assert examine(data_dir).found[0].subject == f"banks/sha256/{NAME}"
    with closing(AdapterStore(data_dir)) as reopened:
        assert digest_of(blob) == record.digest
        publish(reopened, "two", TWO)
        assert banks(data_dir) == {NAME: 1}
        reopened.delete(SHARED, "one")
        assert_consistent(reopened, data_dir)


def test_a_copy_with_links_keeps_them(store: AdapterStore, data_dir: Path, tmp_path: Path) -> None:
    """The commands that `docs/operations.md` gives for backups."""
    publish(store, "one", ONE)
    publish(store, "two", TWO)
    (tmp_path / "backup").mkdir()
    subprocess.run(["cp", "-a", data_dir / "blobs", data_dir / "banks", tmp_path / "backup"], check=True)
    assert banks(tmp_path / "backup") == {NAME: 2}
