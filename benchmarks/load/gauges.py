"""What a server holds at one moment, as it says itself and as the system says of its process. Linux only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Gauges:
    """`pins` are of all adapters together; since the start, `accepted` requests came to `finished` choices."""

    queue_depth: int
    running: int
    kv_bytes: int
    prefix_bytes: int
    pins: int
    open_files: int
    threads: int
    resident_bytes: int
    accepted: int
    finished: int

    @property
    def is_idle(self) -> bool:
        return not (self.queue_depth or self.running or self.kv_bytes or self.pins)


class Observer:
    """Reads the gauges of a server whose process is on this machine."""

    def __init__(self, http: httpx.Client, pid: int) -> None:
        self._http = http
        self._process = Path(f"/proc/{pid}")

    def read(self) -> Gauges:
        metrics = self._metrics()
        return Gauges(
            queue_depth=int(metrics["vblora_queue_depth"]),
            running=int(metrics["vblora_running_sequences"]),
            kv_bytes=int(metrics["vblora_kv_bytes"]),
            prefix_bytes=int(metrics["vblora_prefix_bytes"]),
            pins=sum(adapter["pins"] for adapter in self._adapters()),
            open_files=len(list((self._process / "fd").iterdir())),
            threads=len(list((self._process / "task").iterdir())),
            resident_bytes=int((self._process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            accepted=int(metrics["vblora_generations_total"]),
            finished=int(metrics["vblora_finished_choices_total"]),
        )

    def wait(self, condition: Callable[[Gauges], bool] = lambda gauges: True) -> Gauges:
        """The first gauges of an idle server that also meet the condition. Raises TimeoutError with the last ones."""
        deadline = time.monotonic() + _PATIENCE_S
        while not ((gauges := self.read()).is_idle and condition(gauges)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server does not come to rest: {gauges}")
            time.sleep(0.02)  # so that asking is not what keeps it busy
        return gauges

    def _metrics(self) -> dict[str, float]:
        """By name, summed over labels."""
        sums: dict[str, float] = {"vblora_generations_total": 0.0}
        for family in text_string_to_metric_families(self._http.get("/metrics").text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def _adapters(self) -> Iterator[dict[str, int]]:
        after: str | None = None
        while True:
            query = {"limit": 1000} | ({} if after is None else {"after": after})
            page = self._http.get("/v1/adapters", params=query).json()
            yield from page["data"]
            after = page["next"]
            if after is None:
                return
