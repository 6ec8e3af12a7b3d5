"""A server under everything at once: a mix over all routes, clients that leave, adapters that change, floods.

    python -m benchmarks.soak [--minutes 10] [--quick]

Linux only: it reads /proc. Needs PEFT. A line for every round, and at the end one line of JSON. Exits with 1 if the
server broke a promise: a request without exactly one end, a wrong text, or anything still held when all has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from benchmarks.load.client import Ending, LoadClient, Outcome, by_ending
from benchmarks.load.gauges import Gauges, Observer
from benchmarks.load.plan import Ask, Mix
from benchmarks.report import Target, report_line
from service.commands.bench_figures import quantile
from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.server import Server, parts

TARGETS = (
    Target("overload/accepted_p99_over_drain", at_most=2.0),
    Target("broken", at_most=0),
    Target("memory/second_half_grew_bytes", at_most=32 << 20),
)
PROMPT = "The quick brown fox"


@dataclass(frozen=True, slots=True)
class SoakSizes:
    """A round asks `round_requests` of the mix, `at_once` at a time, then floods with `overload` times what fits."""

    minutes: float = 10.0
    adapters: int = 6
    versions: int = 4  # of the one adapter that changes
    batch: int = 8
    queue: int = 32
    round_requests: int = 200
    at_once: int = 24
    overload: int = 10
    leaving: float = 0.15  # of all clients
    least_rounds: int = 4


QUICK = SoakSizes(minutes=0.0, adapters=3, versions=2, batch=2, queue=9, round_requests=12, at_once=4, overload=3)


@dataclass(slots=True)
class Record:
    """What came of all rounds so far."""

    endings: Counter[str] = field(default_factory=Counter)
    answered_s: list[float] = field(default_factory=list)
    flooded_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    drain_s: list[float] = field(default_factory=list)  # how long what fits would take, at each flood's throughput
    resident_bytes: list[int] = field(default_factory=list)
    heard: set[str] = field(default_factory=set)  # requests that the server began to answer
    wrong_texts: int = 0
    changes: int = 0

    def count(self, outcomes: Sequence[Outcome]) -> None:
        self.endings.update(by_ending(outcomes))
        self.heard.update(outcome.ask.name for outcome in outcomes if outcome.status is not None)

    def steady(self, outcomes: Sequence[Outcome]) -> None:
        self.count(outcomes)
        self.answered_s += seconds_of(outcomes, Ending.ANSWERED)

    def flood(self, outcomes: Sequence[Outcome], fits: int) -> None:
        self.count(outcomes)
        answered = seconds_of(outcomes, Ending.ANSWERED)
        took = max(outcome.ended for outcome in outcomes) - min(outcome.asked for outcome in outcomes)
        self.flooded_s += answered
        self.refused_s += seconds_of(outcomes, Ending.REFUSED)
        if answered:
            self.drain_s.append(fits * took / len(answered))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    sizes = QUICK if options.quick else SoakSizes(minutes=options.minutes)
    with TemporaryDirectory(prefix="vblora-soak-") as directory:
        folder = Path(directory)
        write_models(sizes, folder)
        with open_server(sizes, folder, options.threads) as server:
            record, figures = asyncio.run(soak(sizes, server, folder))
            figures["exit_status"] = server.stop()
            lines = list(logged(server))
            figures["missing_lines"] = len(record.heard - {line["request_id"] for line in lines})
            figures["overload"] = overload_figures(record, lines)
    figures["broken"] += (figures["exit_status"] != 0) + figures["missing_lines"]
    print(report_line("soak", sizes, figures, () if options.quick else TARGETS, options.threads))
    sys.exit(figures["broken"] > 0)


async def soak(sizes: SoakSizes, server: Server, folder: Path) -> tuple[Record, dict[str, Any]]:
    observer = Observer(server.http, server.process.pid)
    versions = await asyncio.to_thread(Versions, sizes, server, folder)
    record, began, rounds = Record(), time.monotonic(), 0
    start = observer.wait()
    while rounds < sizes.least_rounds or time.monotonic() - began < 60 * sizes.minutes:
        async with LoadClient(server.url) as client:
            await one_round(sizes, client, versions, record, rounds)
        gauges = await asyncio.to_thread(observer.wait, lambda gauges: gauges.open_files <= start.open_files)
        record.resident_bytes.append(gauges.resident_bytes)
        rounds += 1
        print(progress(time.monotonic() - began, rounds, record), flush=True)
    return record, figures_of(record, gauges, rounds, time.monotonic() - began)


async def one_round(sizes: SoakSizes, client: LoadClient, versions: Versions, record: Record, number: int) -> None:
    names = adapter_names(sizes)
    steady = Mix(names, leaving=sizes.leaving).asks(sizes.round_requests, seed=f"steady-{number}")
    over = asyncio.Event()
    changing = asyncio.create_task(versions.keep_changing(client.http, record, over))
    checking = asyncio.create_task(versions.keep_checking(client, record, over, number))
    record.steady(await client.run(steady, sizes.at_once))
    over.set()
    await asyncio.gather(changing, checking)
    fits = sizes.batch + sizes.queue
    flood = Mix(names).asks(sizes.overload * fits, seed=f"flood-{number}")
    record.flood(await client.run(flood, at_once=len(flood)), fits)


class Versions:
    """One adapter's versions, which take turns while its texts are checked: each must be one version's, whole."""

    def __init__(self, sizes: SoakSizes, server: Server, folder: Path) -> None:
        self._files = [parts(folder / f"version-{i}") for i in range(sizes.versions)]
        self._text_by_digest: dict[str, str] = {}
        for i in range(sizes.versions):
            digest = server.upload("changing", folder / f"version-{i}", replace="true").json()["digest"]
            answer = server.generate(PROMPT, **_CHECKED)  # nothing else runs yet
            self._text_by_digest[digest] = answer["choices"][0]["text"]

    async def keep_changing(self, http: httpx.AsyncClient, record: Record, over: asyncio.Event) -> None:
        digests = list(self._text_by_digest)
        while not over.is_set():
            turn = record.changes
            if turn % 2:
                body = {"digest": digests[turn % len(digests)]}
                answer = await http.post("/v1/adapters/changing/rollback", json=body)
            else:
                fields = {"params": {"replace": "true"}, "data": {"name": "changing"}}
                answer = await http.post("/v1/adapters", **fields, files=self._files[turn % len(self._files)])
            answer.raise_for_status()
            record.changes += 1

    async def keep_checking(self, client: LoadClient, record: Record, over: asyncio.Event, number: int) -> None:
        turn = 0
        while not over.is_set():
            body = {"prompt": PROMPT, "temperature": 0, "stream": turn % 2 == 0, **_CHECKED}
            outcome = await client.ask(Ask(f"check-{number}-{turn}", "/v1/generate", body))
            record.steady([outcome])
            if outcome.ending is Ending.ANSWERED:
                record.wrong_texts += outcome.texts != (self._text_by_digest.get(outcome.digest or ""),)
            turn += 1


_CHECKED = {"adapter": "changing", "max_new_tokens": 12, "ignore_eos": True}


def figures_of(record: Record, end: Gauges, rounds: int, seconds: float) -> dict[str, Any]:
    held = [name for name in ("queue_depth", "running", "kv_bytes", "pins") if getattr(end, name)]
    unexpected = record.endings.keys() - {"answered", "left", "overloaded"}
    resident = record.resident_bytes
    return {
        "seconds": seconds,
        "rounds": rounds,
        "requests": sum(record.endings.values()),
        "endings": dict(record.endings),
        "adapter_changes": record.changes,
        "answered_p50_s": quantile(record.answered_s, 0.5),
        "answered_p99_s": quantile(record.answered_s, 0.99),
        "memory": {
            "start_bytes": resident[0],
            "middle_bytes": resident[len(resident) // 2],
            "end_bytes": resident[-1],
            "second_half_grew_bytes": resident[-1] - resident[len(resident) // 2],
        },
        "gauges_at_end": asdict(end),
        "wrong_texts": record.wrong_texts,
        "broken": record.wrong_texts + len(held) + len(unexpected),
    }


def overload_figures(record: Record, lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all floods. `asked` is by the clients' clock, which have one core for all of them; `served` is by the log."""
    floods = [line for line in lines if line["request_id"].startswith("load-flood-")]
    refused = [line["duration_s"] for line in floods if line.get("code") == "overloaded"]
    accepted = [line["total_s"] for line in floods if line["status"] == 200 and "total_s" in line]
    accepted_p99, drain = quantile(accepted, 0.99), quantile(record.drain_s, 0.5)
    return {
        "drain_s": drain,
        "accepted_p99_over_drain": accepted_p99 / drain if accepted_p99 and drain else None,
        "served_accepted_p50_s": quantile(accepted, 0.5),
        "served_accepted_p99_s": accepted_p99,
        "served_refused_p50_s": quantile(refused, 0.5),
        "served_refused_p99_s": quantile(refused, 0.99),
        "asked_accepted_p99_s": quantile(record.flooded_s, 0.99),
        "asked_refused_p99_s": quantile(record.refused_s, 0.99),
    }


def logged(server: Server) -> Iterator[dict[str, Any]]:
    """The access log of a server that has ended."""
    for line in server.log:
        if line.startswith("{") and (record := json.loads(line))["logger"] == "vblora.access":
            yield record


def progress(seconds: float, rounds: int, record: Record) -> str:
    endings = ", ".join(f"{count} {ending}" for ending, count in sorted(record.endings.items()))
    return f"{seconds:6.0f} s  round {rounds}  {record.resident_bytes[-1] / 2**20:.1f} MiB  {endings}"


def seconds_of(outcomes: Iterable[Outcome], ending: Ending) -> list[float]:
    return [outcome.seconds for outcome in outcomes if outcome.ending is ending]


def adapter_names(sizes: SoakSizes) -> tuple[str, ...]:
    return tuple(f"adapter-{i}" for i in range(sizes.adapters))


def write_models(sizes: SoakSizes, folder: Path) -> None:
    """A base model, adapters for it, and the versions of the one that changes."""
    model = tiny_model("llama", max_position_embeddings=1024)
    save_model(model, folder / "base")
    names = [*adapter_names(sizes), *(f"version-{i}" for i in range(sizes.versions))]
    for seed, name in enumerate(names):
        make_adapter(model, AdapterSpec(seed=seed), folder / name)


def open_server(sizes: SoakSizes, folder: Path, threads: int) -> Server:
    limits = ("--max-batch-size", f"{sizes.batch}", "--max-queue", f"{sizes.queue}", "--threads", f"{threads}")
    adapters = ",".join(f"{name}={folder / name}" for name in adapter_names(sizes))
    # Little enough for the prefix cache to be full before the first half is over: it grows by right until then.
    arguments = ("serve", "--model", str(folder / "base"), "--log-format", "json", "--kv-memory", "64MiB", *limits)
    return Server(*arguments, data_dir=folder / "data", environ={"VBLORA_ADAPTER": adapters})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Load a server for a while.")
    parser.add_argument("--minutes", type=float, default=10.0, help="for how long (10)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, four rounds: shows that it runs")
    parser.add_argument("--threads", type=int, default=1, help="the threads that the server's model computes with (1)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
