"""The line of JSON that a benchmark ends with."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from service import __version__

_PACKAGES = ("transformers", "peft", "safetensors", "triton")


@dataclass(frozen=True, slots=True)
class Target:
    """What one figure, named by its path in the report, is to reach."""

    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def judge(self, figures: Mapping[str, Any]) -> dict[str, Any] | None:
        """The target, the figure, and whether it was met; None when that was not measured."""
        value: Any = figures
        for part in self.figure.split("/"):
            if part not in value:
                return None
            value = value[part]
        met = (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)
        bound = {"at_least": self.at_least} if self.at_least is not None else {"at_most": self.at_most}
        return {**bound, "measured": value, "met": met}


def report_line(benchmark: str, sizes: Any, figures: Mapping[str, Any], targets: Sequence[Target], threads: int) -> str:
    judged = {target.figure: target.judge(figures) for target in targets}
    report = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(threads),
        "sizes": asdict(sizes),
        **figures,
        "targets": {name: verdict for name, verdict in judged.items() if verdict is not None},
    }
    return json.dumps(_rounded(report))


def describe_machine(threads: int) -> dict[str, Any]:
    """What a figure depends on. `load` is the 1-minute load average at the end: above 1 per core, others took part."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "vblora_serve": __version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _rounded(value: Any) -> Any:
    """Four digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return value
