"""`--adapters-dir`: what a scan registers, what it leaves alone, and what it says of what is refused."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from adapters.errors import AdapterNotFound
from service.adapters_dir import AdaptersDirectory, AdaptersDirectoryWatcher, fingerprints
from tests.api.conftest import Server

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WAIT_S = 20  # for what should take milliseconds


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def directory(server: Server, root: Path) -> AdaptersDirectory:
    return AdaptersDirectory(server.registry, root, max_bytes=1 << 24)


def put(root: Path, name: str, adapter: Path) -> None:
    """An adapter's files, in place of those that were there."""
    shutil.rmtree(root / name, ignore_errors=True)
    shutil.copytree(adapter, root / name)


def names(server: Server) -> list[str]:
    return [adapter["name"] for adapter in server.client.get("/v1/adapters").json()["data"]]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of the directory since it was last asked for; a scan that goes well says nothing."""
    found = [record.getMessage() for record in caplog.records if record.name == "service.adapters_dir"]
    caplog.clear()
    return found


def test_what_is_new_is_registered_and_what_is_no_adapter_is_passed_over(
    server: Server, directory: AdaptersDirectory, root: Path, adapter_dirs: dict[str, Path]
) -> None:
    (root / "README.md").write_text("x")
    (root / "empty").mkdir()
    put(root, ".hidden", adapter_dirs["one"])
    (root / "link").symlink_to(adapter_dirs["one"])
    put(root, "one", adapter_dirs["one"])
    directory.scan()
    assert names(server) == ["one"]
    put(root, "two", adapter_dirs["two"])
    (root / "two" / "chat_template.jinja").write_text("x")
    directory.scan()
    assert names(server) == ["one", "two"]
    assert (server.store.path(server.digest("two")) / "chat_template.jinja").exists()


def test_what_has_not_changed_is_not_even_opened(
    server: Server, directory: AdaptersDirectory, root: Path, adapter_dirs: dict[str, Path]
) -> None:
    put(root, "one", adapter_dirs["one"])
    directory.scan()
    server.client.delete("/v1/adapters/one")
    directory.scan()
    assert names(server) == [], "what was deleted stays deleted until its files change"


def test_what_has_changed_is_a_new_version(
    server: Server, directory: AdaptersDirectory, root: Path, adapter_dirs: dict[str, Path]
) -> None:
    put(root, "sql", adapter_dirs["one"])
    directory.scan()
    first = server.digest("sql")
    put(root, "sql", adapter_dirs["two"])
    directory.scan()
    assert len(server.store.get("", "sql").versions) == 2
    put(root, "sql", adapter_dirs["one"])
    directory.scan()
    assert server.digest("sql") == first, "files that were there before are current again"


def test_a_rollback_is_not_undone_unless_the_files_change(
    server: Server, directory: AdaptersDirectory, root: Path, adapter_dirs: dict[str, Path]
) -> None:
    put(root, "sql", adapter_dirs["one"])
    directory.scan()
    first = server.digest("sql")
    put(root, "sql", adapter_dirs["two"])
    directory.scan()
    server.store.rollback("", "sql", first)
    directory.scan()
    put(root, "sql", adapter_dirs["two"])  # the same bytes in other files
    directory.scan()
    AdaptersDirectory(server.registry, root, max_bytes=1 << 24).scan()  # as after a restart
    assert server.digest("sql") == first
    put(root, "sql", adapter_dirs["logits"])
    directory.scan()
    assert server.digest("sql") != first


def test_a_directory_that_is_gone_deletes_nothing(
    server: Server, directory: AdaptersDirectory, root: Path, adapter_dirs: dict[str, Path]
) -> None:
    put(root, "one", adapter_dirs["one"])
    directory.scan()
    shutil.rmtree(root / "one")
    directory.scan()
    assert names(server) == ["one"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
        (lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100]), "the file holds"),
        (lambda path: (path / "tokenizer_config.json").write_text("["), "is not valid JSON"),
        (lambda path: os.truncate(path / CONFIG, 10), "is not valid JSON"),
    ],
    ids=["no-weights", "half-weights", "bad-tokenizer-config", "half-config"],
)
def test_what_is_refused_is_logged_once_and_tried_again_when_it_changes(
    server: Server,
    directory: AdaptersDirectory,
    root: Path,
    adapter_dirs: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    damage: object,
    reason: str,
) -> None:
    put(root, "one", adapter_dirs["one"])
    put(root, "two", adapter_dirs["two"])
    damage(root / "one")  # type: ignore[operator]
    directory.scan()
    assert names(server) == ["two"]
    (said,) = warnings(caplog)
    assert reason in said
    assert str(root / "one") in said
    directory.scan()
    assert warnings(caplog) == []
    put(root, "one", adapter_dirs["one"])
    directory.scan()
    assert names(server) == ["one", "two"]


@pytest.mark.parametrize("name", ["base", "tiny-llama", "ü", "a b"])
def test_names_that_no_adapter_may_have(
    server: Server,
    directory: AdaptersDirectory,
    root: Path,
    adapter_dirs: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    put(root, name, adapter_dirs["one"])
    directory.scan()
    directory.scan()
    assert len(warnings(caplog)) == 1
    server.assert_nothing_left()


def test_a_refused_change_leaves_the_version_before(
    server: Server, directory: AdaptersDirectory, root: Path, adapter_dirs: dict[str, Path]
) -> None:
    put(root, "sql", adapter_dirs["one"])
    directory.scan()
    before = server.digest("sql")
    (root / "sql" / WEIGHTS).write_bytes(b"half")
    directory.scan()
    assert server.digest("sql") == before


def test_files_that_change_while_they_are_copied_wait_for_the_next_scan(
    server: Server,
    directory: AdaptersDirectory,
    root: Path,
    adapter_dirs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from service import adapters_dir

    copy = adapters_dir.copy_child

    def copy_while_written(*arguments: object, **options: object) -> None:
        copy(*arguments, **options)  # type: ignore[arg-type]
        shutil.copy(adapter_dirs["two"] / WEIGHTS, root / "sql" / WEIGHTS)

    put(root, "sql", adapter_dirs["one"])
    monkeypatch.setattr(adapters_dir, "copy_child", copy_while_written)
    directory.scan()
    assert names(server) == []
    monkeypatch.undo()
    directory.scan()
    assert names(server) == ["sql"]
    assert warnings(caplog) == []


def test_a_full_disk_is_tried_again_and_logged_once(
    server: Server,
    directory: AdaptersDirectory,
    root: Path,
    adapter_dirs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    put(root, "one", adapter_dirs["one"])
    monkeypatch.setattr("service.adapters_dir.copy_child", full)
    directory.scan()
    directory.scan()
    (said,) = warnings(caplog)
    assert "full" in said
    monkeypatch.undo()
    directory.scan()
    assert names(server) == ["one"]


def test_a_directory_that_cannot_be_read_is_logged_once(
    server: Server,
    directory: AdaptersDirectory,
    root: Path,
    adapter_dirs: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    root.rmdir()
    directory.scan()
    directory.scan()
    assert len(warnings(caplog)) == 1
    put(root, "one", adapter_dirs["one"])
    directory.scan()
    assert names(server) == ["one"]


def test_a_fingerprint_covers_the_adapters_files_alone(root: Path, adapter_dirs: dict[str, Path]) -> None:
    put(root, "one", adapter_dirs["one"])
    before = fingerprints(root)
    (root / "one" / "README.md").write_text("x")
    assert fingerprints(root) == before
    (root / "one" / "chat_template.jinja").write_text("x")
    assert fingerprints(root) != before


class Noticed(AdaptersDirectory):
    """Says when a scan has ended."""

    def __init__(self, server: Server, root: Path) -> None:
        super().__init__(server.registry, root, max_bytes=1 << 24)
        self.scans = threading.Semaphore(0)
        self.broken = False

    def scan(self) -> None:
        try:
            if self.broken:
                raise ZeroDivisionError
            super().scan()
        finally:
            self.scans.release()

    def wait(self) -> None:
        """Until a scan has begun and ended from now on."""
        while self.scans.acquire(blocking=False):
            pass
        assert all(self.scans.acquire(timeout=WAIT_S) for _ in range(2))


def test_the_watcher_scans_until_it_is_stopped(server: Server, root: Path, adapter_dirs: dict[str, Path]) -> None:
    directory = Noticed(server, root)
    watcher = AdaptersDirectoryWatcher(directory, interval_s=0.001)
    watcher.start()
    try:
        directory.wait()
        put(root, "one", adapter_dirs["one"])
        directory.wait()
        assert server.store.get("", "one")
        directory.broken = True
        directory.wait()
        directory.broken = False
        put(root, "two", adapter_dirs["two"])
        directory.wait()
        assert server.store.get("", "two"), "a scan that fails is not the last"
    finally:
        watcher.stop()
    put(root, "three", adapter_dirs["one"])
    with pytest.raises(AdapterNotFound):
        server.store.get("", "three")
    assert "vblora-adapters-dir" not in {thread.name for thread in threading.enumerate()}
