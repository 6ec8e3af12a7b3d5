"""A server of a shared store killed anywhere: what it acknowledged is there, and nothing half-written is listed.

Run as a program, this module is the process that gets killed: URL ENDPOINT DATA_DIR KIND CALL makes one change and is
killed just before or just after one of its calls to the object storage, and for a directory at each step on the disk.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import adapters
from adapters.store import digest_of
from adapters.store.inventory import Problem
from adapters.store.shared import open_objects
from adapters.store.shared.garbage import examine, repair
from tests.unit.adapters.shared_support import BUCKET, Faulty, shared
from tests.unit.adapters.test_store_kill import (
    KEEP,
    PREPARATION,
    STEPS,
    Model,
    apply,
    contents_by_digest,
    observed,
)

KINDS = ["publish", "delete", "rollback", "activate", "deactivate"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["file", "s3"])
def test_killed_at_every_step(tmp_path: Path, s3_endpoint: Callable[[], str], where: str, kind: str) -> None:
    """The change is absent up to its commit and complete from there on; what else is left is garbage."""
    contents = contents_by_digest(tmp_path)
    outcomes = []
    before = Model()
    for operation in PREPARATION:
        before = before.after(operation)
    after = before.after(STEPS[kind])
    endpoint = s3_endpoint() if where == "s3" else ""
    for call in itertools.count():
        url = f"file://{tmp_path}/objects-{call}" if where == "file" else f"s3://{BUCKET}/{kind}-{call}"
        objects = open_objects(url, endpoint or None)
        with closing(shared(objects, tmp_path / "first", keep_versions=KEEP)) as store:
            for operation in PREPARATION:
                apply(store, operation)
        program = [sys.executable, "-m", "tests.unit.adapters.test_store_shared_kill"]
        child = subprocess.run([*program, url, endpoint, str(tmp_path / "killed"), kind, str(call)], cwd=ROOT)
        assert child.returncode in (0, -signal.SIGKILL)
        with closing(shared(objects, tmp_path / f"other-{call}", keep_versions=KEEP)) as store:
            outcomes.append(observed(store, contents))
            for _, _, version in store.all_versions():
                assert digest_of(store.fetch(version.digest)) == version.digest
        assert {finding.problem for finding in repair(objects, grace_s=-5).found} <= {Problem.UNREFERENCED}
        assert not examine(objects, grace_s=-5).found
        if child.returncode == 0:
            break
    assert len(outcomes) > 4
    committed = outcomes.index(after)
    assert committed > 0
    assert outcomes == [before] * committed + [after] * (len(outcomes) - committed)


ROOT = Path(adapters.__file__).parents[1]


def main(url: str, endpoint: str, data_dir: str, kind: str, last_call: str) -> None:
    objects = Faulty(open_objects(url, endpoint or None))
    store = shared(objects, Path(data_dir), keep_versions=KEEP)
    calls = itertools.count()

    def count(*_: object) -> None:
        if next(calls) == int(last_call):
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count()
            return real(*args, **kwargs)

        return call

    objects.before = objects.after = count
    if not endpoint:
        for name in ("chmod", "fsync", "utime", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
    apply(store, STEPS[kind])  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
