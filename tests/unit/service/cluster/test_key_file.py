"""Keys that are read anew without a signal."""

from __future__ import annotations

import os
from pathlib import Path

from service.api.keys import KeyRing, load_key_file
from service.cluster.key_file import KeyFile


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, *keys: str) -> None:
    """Replaced, as an editor and Kubernetes do it."""
    fresh = path.with_suffix(".fresh")
    fresh.write_text("".join(f"{key}\n" for key in keys))
    os.replace(fresh, path)


def test_a_key_that_is_revoked_is_refused_and_a_new_one_taken(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    write(path, "old")
    ring = KeyRing(load_key_file(path))
    file = KeyFile(path, ring, clock)
    write(path, "new")
    file.look()
    assert ring.find("old") is not None, "not at every request"
    clock.now += 10
    file.look()
    assert ring.find("old") is None
    assert ring.find("new") is not None


def test_a_file_that_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    write(path, "old")
    ring = KeyRing(load_key_file(path))
    file = KeyFile(path, ring, clock)
    for damage in (lambda: path.write_text("sha256:short\n"), path.unlink):
        damage()
        clock.now += 10
        file.look()
        assert ring.find("old") is not None
    write(path, "new")
    clock.now += 10
    file.look()
    assert ring.find("new") is not None
