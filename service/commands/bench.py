"""`vblora-serve bench URL`: measures a running server, this one or another that speaks OpenAI's completions.

No torch: it starts at once, and leaves the processor to the server.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import TextIO

from service import __version__
from service.commands import CommandError
from service.commands.bench_client import BenchClient, Manner
from service.commands.bench_figures import Results
from service.commands.bench_loops import Record, closed_loop, open_loop
from service.commands.bench_plan import Ask, Popularity, Prompt, arrivals, deal, random_prompts, read_prompts
from service.commands.bench_report import show_results
from service.commands.output import complain
from service.commands.progress import counting, working

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked. `rate` None: a closed loop of `concurrency` clients. `adapters` empty: all that are served."""

    adapters: tuple[str, ...]
    popularity: Popularity
    requests: int
    concurrency: int
    rate: float | None
    prompt_tokens: int
    prompt_file: Path | None
    max_new_tokens: int
    warmup: int
    seed: int


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Whom to ask for what, and where the line of JSON goes: to a file, or for `-` to standard output."""

    url: str
    api_key: str | None
    manner: Manner
    load: Load
    json: str | None


def run(options: BenchOptions) -> int:
    """Measures and reports; 1 if any request was not answered. Raises CommandError, UsageError.

    Ctrl-C ends the measurement early: what was measured by then is reported, and the exit code is 130.
    """
    record = Record()
    prompts = read_prompts(options.load.prompt_file) if options.load.prompt_file else None
    with _json_file(options.json) as file:
        interrupted = False
        try:
            asyncio.run(_measure(options, prompts, record))
        except KeyboardInterrupt:
            if not record.outcomes:
                raise
            interrupted = True
        results = Results.of(record)
        if file is not None:
            file.write(json.dumps(_described(options, results, interrupted=interrupted)) + "\n")
        if options.json != "-":
            show_results(results, _title(options))
    if interrupted:
        complain("interrupted: this is what was measured until then")
        return INTERRUPTED
    return 0 if results.all_answered else 1


async def _measure(options: BenchOptions, prompts: Sequence[Prompt] | None, record: Record) -> None:
    load = options.load
    async with BenchClient(options.url, options.api_key, options.manner) as client:
        with working(f"Asking {options.url} what it serves"):
            served = await client.served()
            adapters = load.adapters or served
            if not adapters:
                raise CommandError(f"{options.url} serves no model; name one with --adapter")
            pool = [] if prompts else await client.token_pool(adapters[0])
        warmup, asks = _asks(load, adapters, prompts, pool)
        with working("Warming up"):
            await closed_loop(client.ask, warmup, load.concurrency, Record())
        with counting("Measuring", len(asks)) as advance:
            record.seen = lambda outcome: advance(1)
            if load.rate is None:
                await closed_loop(client.ask, asks, load.concurrency, record)
            else:
                await open_loop(client.ask, asks, arrivals(len(asks), load.rate, load.seed), record)


def _asks(
    load: Load, adapters: Sequence[str], prompts: Sequence[Prompt] | None, pool: Sequence[int]
) -> tuple[list[Ask], list[Ask]]:
    """The requests of the warm-up, and those that are measured."""
    count = load.warmup + load.requests
    chosen = islice(cycle(prompts), count) if prompts else random_prompts(count, load.prompt_tokens, pool, load.seed)
    texts = list(chosen)
    warmup = deal(adapters, load.warmup, Popularity.ROUND_ROBIN, load.seed)
    names = [*warmup, *deal(adapters, load.requests, load.popularity, load.seed)]
    asks = [Ask(name, text, load.max_new_tokens) for name, text in zip(names, texts, strict=True)]
    return asks[: load.warmup], asks[load.warmup :]


@contextmanager
def _json_file(path: str | None) -> Iterator[TextIO | None]:
    """Opened before anything is measured, so that it is not lost for a file that cannot be written."""
    if path is None or path == "-":
        yield None if path is None else sys.stdout
        return
    with open(path, "a", encoding="utf-8") as file:
        yield file


def _title(options: BenchOptions) -> str:
    load = options.load
    loop = f"{load.concurrency} at a time" if load.rate is None else f"{load.rate:g} a second, by chance"
    prompt = f"prompts of {load.prompt_file}" if load.prompt_file else f"prompts of {load.prompt_tokens} tokens"
    return f"{options.url} ({options.manner.dialect}): {loop}, {prompt}, at most {load.max_new_tokens} new tokens each"


def _described(options: BenchOptions, results: Results, *, interrupted: bool) -> dict[str, object]:
    load = {**asdict(options.load), "prompt_file": str(options.load.prompt_file) if options.load.prompt_file else None}
    return {
        "url": options.url,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "vblora_serve": __version__,
        "load": load,
        "manner": asdict(options.manner),
        "interrupted": interrupted,
        **results.to_dict(),
    }
