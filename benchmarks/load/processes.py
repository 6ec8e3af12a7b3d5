"""The processor time of a process and of all that it started. Linux only: it reads /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_PARENT, _TICKS = 1, slice(11, 13)  # of the fields after the name: the parent; user and system time


@dataclass(frozen=True, slots=True)
class _Process:
    parent: int
    seconds: float


def tree_cpu_s(root: int) -> float:
    """Since each of them began. Those that have ended are not in it."""
    processes = _all()
    children: defaultdict[int, list[int]] = defaultdict(list)
    for number, process in processes.items():
        children[process.parent].append(number)
    total, waiting = 0.0, [root]
    while waiting:
        number = waiting.pop()
        waiting += children[number]
        total += processes[number].seconds if number in processes else 0.0
    return total


def _all() -> dict[int, _Process]:
    found = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            ticks = sum(map(int, fields[_TICKS]))
            found[int(directory.name)] = _Process(int(fields[_PARENT]), ticks / os.sysconf("SC_CLK_TCK"))
    return found
