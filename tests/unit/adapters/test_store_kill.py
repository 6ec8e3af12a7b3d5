"""What the store has acknowledged survives kill -9, and nothing half-written is ever listed.

Run as a program, this module is the process that gets killed (so it imports little: it starts a hundred times):

    test_store_kill.py churn DATA_DIR SEED      changes without end, a line on stdout after each
    test_store_kill.py step DATA_DIR KIND CALL  one change, killed just before its CALL-th step on the disk
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adapters
from adapters.errors import AdapterNotFound
from adapters.split_file import BANK_FILE, WEIGHTS_FILE, is_split
from adapters.store import AdapterStore, digest_of
from adapters.store.inventory import Problem
from adapters.store.repair import repair
from tests.unit.adapters.store_support import banks, weights_with

SHARED = ""
KEEP = 2
KILLS = 100
ACKNOWLEDGEMENT = b"done\n"
DEBRIS = {Problem.LEFTOVER, Problem.UNREFERENCED}
BANKS = [b"x" * 20_000, b"x" * 20_000, b"y" * 20_000]  # of contents 0 and 1, which share theirs, and of 2
WHOLE = 3  # the content without a bank


@dataclass(frozen=True)
class Operation:
    kind: str  # publish, delete, rollback, activate or deactivate
    name: str
    content: int = 0


# Two versions, of which the next prunes the older one's files; the newer one's are shared.
PREPARATION = [
    Operation("publish", "a", 0),
    Operation("publish", "a", 1),
    Operation("publish", "b", 1),
    Operation("activate", "a"),
]
ONE_MORE = {"delete the last": Operation("publish", "c", 2)}  # the only one with its bank
STEPS = {
    "publish": Operation("publish", "a", 2),
    "delete": Operation("delete", "a"),
    "delete the last": Operation("delete", "c"),
    "rollback": Operation("rollback", "a"),
    "activate": Operation("activate", "b"),
    "deactivate": Operation("deactivate", "a"),
}


def operations(seed: int) -> Iterator[Operation]:
    rng = random.Random(seed)
    kinds = ["publish"] * 4 + ["delete", "rollback", "activate", "deactivate"]
    while True:
        yield Operation(rng.choice(kinds), f"adapter-{rng.randrange(3)}", rng.randrange(4))


def write_files(directory: Path, content: int) -> None:
    (directory / "adapter_config.json").write_text(f'{{"content": {content}}}')
    own = b"%d" % content * 20_000
    weights = own if content == WHOLE else weights_with(BANKS[content], own)
    (directory / "adapter_model.safetensors").write_bytes(weights)


def apply(store: AdapterStore, operation: Operation) -> None:
    try:
        match operation.kind:
            case "publish":
                with store.staging() as staged:
                    write_files(staged, operation.content)
                    store.publish(SHARED, operation.name, staged, {}, replace=True)
            case "delete":
                store.delete(SHARED, operation.name)
            case "rollback":
                oldest = store.get(SHARED, operation.name).versions[-1]
                store.rollback(SHARED, operation.name, oldest.digest)
            case "activate":
                store.activate(SHARED, operation.name, "switch")
            case "deactivate":
                store.deactivate(SHARED, operation.name)
    except AdapterNotFound:
        pass


@dataclass
class Model:
    """What the store should hold: per name the current content and all its contents, newest first."""

    current: dict[str, int] = field(default_factory=dict)
    versions: dict[str, list[int]] = field(default_factory=dict)
    active: str | None = None

    def after(self, operation: Operation) -> Model:
        model = Model(dict(self.current), dict(self.versions), self.active)
        name, content = operation.name, operation.content
        if operation.kind == "publish":
            if model.current.get(name) != content:
                others = [other for other in model.versions.get(name, []) if other != content]
                model.versions[name] = [content, *others][:KEEP]
                model.current[name] = content
        elif operation.kind == "deactivate":
            model.active = None if model.active == name else model.active
        elif name in model.current:
            if operation.kind == "delete":
                del model.current[name], model.versions[name]
                model.active = None if model.active == name else model.active
            elif operation.kind == "rollback":
                model.current[name] = model.versions[name][-1]
            else:
                model.active = name
        return model


def observed(store: AdapterStore, contents: dict[str, int]) -> Model:
    records, _ = store.list(SHARED)
    active = store.active(SHARED)
    return Model(
        {record.name: contents[record.digest] for record in records},
        {record.name: [contents[version.digest] for version in record.versions] for record in records},
        active.name if active else None,
    )


def assert_whole(store: AdapterStore, data_dir: Path) -> None:
    listed = {version.digest for _, _, version in store.all_versions()}
    assert all(digest_of(store.path(digest)) == digest for digest in listed)
    assert {f"sha256:{path.name}" for path in (data_dir / "blobs" / "sha256").iterdir()} == listed
    assert list((data_dir / "tmp").iterdir()) == []
    links = [link for folder in ("blobs", "quarantine") for link in (data_dir / folder).rglob(BANK_FILE)]
    assert banks(data_dir) == Counter(hashlib.sha256(link.read_bytes()).hexdigest() for link in links)
    assert sum(not is_split(store.path(digest) / WEIGHTS_FILE) for digest in listed) <= 1, "all but one have banks"


def contents_by_digest(tmp_path: Path) -> dict[str, int]:
    found = {}
    for content in range(4):
        directory = tmp_path / f"content-{content}"
        directory.mkdir()
        write_files(directory, content)
        found[digest_of(directory)] = content
    return found


def start(*args: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(adapters.__file__).parents[1])}
    command = [sys.executable, __file__, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


def acknowledged_before_kill(child: subprocess.Popen[bytes], at_least: int, then_spin: int) -> int:
    """Kill the child some time after its `at_least`-th acknowledgement; how many it has given in all."""
    assert child.stdout is not None
    with child:
        for _ in range(at_least):
            assert child.stdout.readline() == ACKNOWLEDGEMENT
        for _ in range(then_spin):
            pass
        child.kill()
        unread = child.stdout.read()
    assert child.returncode == -signal.SIGKILL
    return at_least + unread.count(ACKNOWLEDGEMENT)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    data_dir, contents = tmp_path / "data", contents_by_digest(tmp_path)
    rng = random.Random(15)
    model = Model()
    acknowledged: set[str] = set()
    for seed in range(KILLS):
        done = acknowledged_before_kill(
            start("churn", data_dir, seed), at_least=rng.randrange(1, 25), then_spin=rng.randrange(200_000)
        )
        stream = operations(seed)
        for operation in itertools.islice(stream, done):
            model = model.after(operation)
            acknowledged.add(operation.kind)
        if seed % 4 == 0:  # what `doctor` calls debris is debris
            assert {finding.problem for finding in repair(data_dir).found} <= DEBRIS
        with closing(AdapterStore(data_dir, keep_versions=KEEP)) as store:
            seen = observed(store, contents)
            assert_whole(store, data_dir)
        assert seen in (model, model.after(next(stream))), f"after {done} operations of seed {seed}"
        model = seen
    assert acknowledged == {"publish", "delete", "rollback", "activate", "deactivate"}


def test_publish_killed_at_every_step(tmp_path: Path) -> None:
    kill_at_every_step(tmp_path, "publish")


def test_delete_killed_at_every_step(tmp_path: Path) -> None:
    kill_at_every_step(tmp_path, "delete")


def test_delete_of_the_last_with_a_bank_killed_at_every_step(tmp_path: Path) -> None:
    kill_at_every_step(tmp_path, "delete the last")


def test_rollback_killed_at_every_step(tmp_path: Path) -> None:
    kill_at_every_step(tmp_path, "rollback")


def test_activation_killed_at_every_step(tmp_path: Path) -> None:
    kill_at_every_step(tmp_path, "activate")


def test_deactivation_killed_at_every_step(tmp_path: Path) -> None:
    kill_at_every_step(tmp_path, "deactivate")


def kill_at_every_step(tmp_path: Path, kind: str) -> None:
    """One kill per step: the change is absent up to its commit and complete from there on."""
    contents = contents_by_digest(tmp_path)
    with closing(AdapterStore(tmp_path / "before", keep_versions=KEEP)) as store:
        before = Model()
        for operation in (*PREPARATION, *((ONE_MORE[kind],) if kind in ONE_MORE else ())):
            apply(store, operation)
            before = before.after(operation)
    after = before.after(STEPS[kind])
    outcomes = []
    for call in itertools.count():
        data_dir = tmp_path / f"killed-{call}"
        subprocess.run(["cp", "-a", tmp_path / "before", data_dir], check=True)  # with hard links as they are
        with start("step", data_dir, kind, call) as child:
            killed = child.wait() != 0
        assert child.returncode == (-signal.SIGKILL if killed else 0)
        with closing(AdapterStore(data_dir, keep_versions=KEEP)) as store:
            outcomes.append(observed(store, contents))
            assert_whole(store, data_dir)
        if not killed:
            break
    committed = outcomes.index(after)
    assert committed > 0
    assert outcomes == [before] * committed + [after] * (len(outcomes) - committed)


def churn(data_dir: Path, seed: int) -> None:
    store = AdapterStore(data_dir, keep_versions=KEEP)
    for operation in operations(seed):
        apply(store, operation)
        os.write(sys.stdout.fileno(), ACKNOWLEDGEMENT)


def step(data_dir: Path, kind: str, last_call: int) -> None:
    store = AdapterStore(data_dir, keep_versions=KEEP)
    calls = itertools.count()

    def count(*_: object) -> None:
        if next(calls) == last_call:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count()
            return real(*args, **kwargs)

        return call

    for name in ("mkdir", "chmod", "fsync", "link", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    store._database.connection.set_trace_callback(count)
    apply(store, STEPS[kind])


if __name__ == "__main__":
    role, directory, *rest = sys.argv[1:]
    if role == "churn":
        churn(Path(directory), int(rest[0]))
    else:
        step(Path(directory), rest[0], int(rest[1]))
