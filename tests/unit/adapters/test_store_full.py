"""A disk that is full at any moment: what is asked for happens or does not, and nothing else changes.

Once with the failure injected at each single step, and once on a real file system that is really full. Run as a
program, this module is what happens there:

    test_store_full.py MOUNT_POINT
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import adapters
from adapters.errors import StorageFull
from adapters.store import AdapterRecord, AdapterStore, digest_of
from tests.unit.adapters.store_support import banks, weights_with

SHARED = ""
KEEP = 2
PAGE = 4096
DISK = 16 << 20  # bytes, of the real file system
CALLS = ("mkdir", "open", "fchmod", "fsync", "link", "rename", "replace")


def publish(store: AdapterStore, name: str, content: int) -> AdapterRecord:
    with store.staging() as staged:
        (staged / "adapter_config.json").write_text("{}")
        weights = weights_with(b"bank %d" % (content // 2) * 4_000, own=b"%d" % content * 20_000)
        (staged / "adapter_model.safetensors").write_bytes(weights)
        return store.publish(SHARED, name, staged, {"info": "x" * 5000}, replace=True)


def prepare(data_dir: Path) -> None:
    """Two versions of `a`, the newer one shared with `b`, and `a` active."""
    with closing(AdapterStore(data_dir, keep_versions=KEEP)) as store:
        publish(store, "a", 0)
        publish(store, "a", 1)
        publish(store, "b", 1)
        store.activate(SHARED, "a", "switch")


def copy(data_dir: Path, target: Path) -> None:
    """With hard links as they are."""
    subprocess.run(["cp", "-a", data_dir, target], check=True)


OPERATIONS: dict[str, Callable[[AdapterStore], object]] = {
    "publish": lambda store: publish(store, "c", 2),
    "replace": lambda store: publish(store, "a", 2),
    "rollback": lambda store: store.rollback(SHARED, "a", store.get(SHARED, "a").versions[-1].digest),
    "activate": lambda store: store.activate(SHARED, "b", "merge"),
    "deactivate": lambda store: store.deactivate(SHARED, "a"),
    "delete": lambda store: store.delete(SHARED, "a"),
}


def contents(store: AdapterStore) -> object:
    """What it answers, but for times."""
    records, _ = store.list(SHARED)
    listed = [(record.name, record.digest, [version.digest for version in record.versions]) for record in records]
    return listed, store.active(SHARED)


def assert_whole(store: AdapterStore, data_dir: Path) -> None:
    listed = {version.digest for _, _, version in store.all_versions()}
    assert all(digest_of(store.path(digest)) == digest for digest in listed)
    assert {f"sha256:{path.name}" for path in (data_dir / "blobs" / "sha256").iterdir()} == listed
    assert list((data_dir / "tmp").iterdir()) == []
    assert sum(banks(data_dir).values()) == len(listed), "every adapter has a bank, and every bank an adapter"
    assert all(adapters > 0 for adapters in banks(data_dir).values())


class FullDisk:
    """Is full at the `call`-th step from now: of the file system's calls, or of SQLite's statements."""

    def __init__(self, call: int) -> None:
        self._calls = itertools.count()
        self._call = call
        self.reached = False

    def _is_full(self) -> bool:
        self.reached |= (full := next(self._calls) == self._call)
        return full

    @contextmanager
    def under(self, store: AdapterStore) -> Iterator[None]:
        with (
            mock.patch.multiple(
                os,
                **{name: self._file_call(getattr(os, name)) for name in CALLS},
            ),
            mock.patch.object(store._database, "connection", _Connection(store._database.connection, self)),
        ):
            yield

    def _file_call(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_full():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call

    def check_statement(self) -> None:
        if self._is_full():
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error


class _Connection:
    def __init__(self, real: sqlite3.Connection, disk: FullDisk) -> None:
        self._real = real
        self._disk = disk

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        self._disk.check_statement()
        return self._real.execute(sql, *args)

    def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:
        self._disk.check_statement()
        return self._real.executemany(sql, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_a_disk_that_fills_up_at_any_step(tmp_path: Path) -> None:
    prepare(tmp_path / "before")
    for name, operation in OPERATIONS.items():
        outcomes = []
        for call in itertools.count():
            data_dir = tmp_path / f"{name}-{call}"
            copy(tmp_path / "before", data_dir)
            disk = FullDisk(call)
            with closing(AdapterStore(data_dir, keep_versions=KEEP)) as store:
                before = contents(store)
                refused = False
                try:
                    with disk.under(store):
                        operation(store)
                except StorageFull:
                    refused = True
                    assert contents(store) == before, f"{name}, call {call}"
                    assert_whole(store, data_dir)
                    operation(store)  # there is room again
                after = contents(store)
            with closing(AdapterStore(data_dir, keep_versions=KEEP)) as store:
                assert contents(store) == after != before, f"{name}, call {call}"
                assert_whole(store, data_dir)
            if not disk.reached:
                break
            outcomes.append(refused)
        assert len(outcomes) >= 3
        assert any(outcomes) == (name != "delete"), "deleting is how room is made"


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a tmpfs of a few megabytes, where the machine lets us mount one."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    script = f'mount -t tmpfs -o size={DISK} tmpfs "$0"; exec "$@"'
    if subprocess.run([*mount, script, tmp_path, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets nobody mount a file system")
    environment = {**os.environ, "PYTHONPATH": str(Path(adapters.__file__).parents[1])}
    command = [*mount, script, str(tmp_path), sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(OPERATIONS.keys() - {"delete"}), "each was refused, but deleting never is"


def on_a_full_disk(mount_point: Path) -> None:
    """Every operation with every amount of room that is left, from none to plenty."""
    prepare(mount_point / "before")
    refused = set()
    for name, operation in OPERATIONS.items():
        for room in range(0, 400_000, 5 * PAGE):
            data_dir, filler = mount_point / "data", mount_point / "filler"
            copy(mount_point / "before", data_dir)
            with closing(AdapterStore(data_dir, keep_versions=KEEP)) as store:
                before = contents(store)
                _fill(filler, room)
                try:
                    operation(store)
                except StorageFull:
                    refused.add(name)
                    assert contents(store) == before, f"{name} with room for {room} bytes"
                    assert_whole(store, data_dir)
                    filler.unlink()
                    operation(store)
                filler.unlink(missing_ok=True)
                after = contents(store)
            with closing(AdapterStore(data_dir, keep_versions=KEEP)) as store:
                assert contents(store) == after != before, f"{name} with room for {room} bytes"
                assert_whole(store, data_dir)
            shutil.rmtree(data_dir)
    print(*sorted(refused))


def _fill(filler: Path, room: int) -> None:
    """Leaves `room` bytes free."""
    with open(filler, "wb", buffering=0) as file:
        with suppress(OSError):  # that it is full
            while file.write(b"\0" * PAGE):
                pass
        file.truncate(file.tell() - room)
    assert shutil.disk_usage(filler.parent).free >= room


if __name__ == "__main__":
    on_a_full_disk(Path(sys.argv[1]))
