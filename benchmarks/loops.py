"""The same load on one contender after another: in a closed loop, at offered rates, and over HTTP or without it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.contenders.lineup import SERVER, Endpoints, agreed, check_answers
from benchmarks.decode_step import rotated
from benchmarks.floor import Floor
from benchmarks.load.streams import Answers, Ask, Endpoint, Latencies, Stream, closed_loop, open_loop
from benchmarks.sizes import ServingSizes
from benchmarks.stage import Stage, running_engine
from benchmarks.workload import make_requests
from service.engine.events import Event, FinishedEvent, TokenEvent
from service.engine.seam import Engine
from service.engine.selection import Selection
from service.engine.sequence import GenerationRequest


def measure_closed_loop(
    label: str, sizes: ServingSizes, endpoints: Endpoints, chosen: Sequence[Selection], floor: Floor, rounds: int
) -> dict[str, Any]:
    """Every contender answers the same requests once a round, in turn, to as many clients as ask again at once.

    The label makes prompts of its own: the server remembers those that it has seen.
    """
    _check(label, sizes, endpoints, chosen, floor)
    closed_loop(endpoints[SERVER].ask, make_requests(sizes, chosen, f"{label}-warm"), sizes.clients)
    requests = [make_requests(sizes, chosen, f"{label}-{turn}") for turn in range(rounds)]

    def ask(endpoint: Endpoint, turn: int) -> Answers:
        return closed_loop(endpoint.ask, requests[turn], sizes.clients)

    return {
        "clients": sizes.clients,
        "adapters": len(chosen),
        "output_tokens": sum(request.params.max_new_tokens for request in requests[0]),
        **compared(endpoints, rounds, ask),
        "floor": {f"rows_{rows}": floor.of(requests[0], rows) for rows in dict.fromkeys((1, sizes.clients))},
    }


def measure_open_loop(
    label: str, sizes: ServingSizes, endpoints: Endpoints, chosen: Sequence[Selection], floor: Floor, rounds: int
) -> dict[str, Any]:
    """The same arrivals at each contender, in turn, at each rate of requests a second."""
    arriving = replace(sizes, requests=sizes.arrivals)
    _check(label, sizes, endpoints, chosen, floor)
    figures = {}
    for rate in sizes.offered:
        requests = [make_requests(arriving, chosen, f"{label}-{rate:g}-{turn}") for turn in range(rounds)]

        def ask(endpoint: Endpoint, turn: int, rate: float = rate, requests: Any = requests) -> Answers:
            return open_loop(endpoint.ask, requests[turn], rate, seed=turn)

        output = sum(request.params.max_new_tokens for request in requests[0])
        figures[f"{rate:g}"] = {
            "offered_tokens_per_s": rate * output / sizes.arrivals,
            **compared(endpoints, rounds, ask),
            "floor": {"rows_1": floor.of(requests[0], 1)},
        }
    return figures


def _check(label: str, sizes: ServingSizes, endpoints: Endpoints, chosen: Sequence[Selection], floor: Floor) -> None:
    checked = replace(sizes, requests=sizes.clients, output=sizes.checked_output)
    check_answers(
        endpoints, make_requests(checked, chosen, f"{label}-check"), sizes.clients, alike=floor.dtype is torch.float32
    )


def compared(endpoints: Endpoints, rounds: int, ask: Callable[[Endpoint, int], Answers]) -> dict[str, Any]:
    """The medians of what each contender's clients saw, and of the server's ratios to its neighbours in turn."""
    seen: dict[str, list[Latencies]] = {name: [] for name in endpoints}
    shares = []
    for turn in range(rounds):
        answers = {name: ask(endpoints[name], turn) for name in rotated(list(endpoints), turn)}
        shares.append(agreed(answers))
        for name, of_one in answers.items():
            seen[name].append(Latencies.of(of_one))
    ours = seen[SERVER]
    return {
        "agreed": fmean(shares),
        "contenders": {name: medians([asdict(one) for one in latencies]) for name, latencies in seen.items()},
        **{f"over_{name}": ratios(ours, theirs) for name, theirs in seen.items() if name != SERVER},
    }


def ratios(ours: Sequence[Latencies], theirs: Sequence[Latencies]) -> dict[str, float]:
    """How many times the throughput, and how many times the latencies."""
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "throughput": median(our.tokens_per_s / their.tokens_per_s for our, their in pairs),
        "first_token_p50": median(our.first_token_p50_ms / their.first_token_p50_ms for our, their in pairs),
        "first_token_p99": median(our.first_token_p99_ms / their.first_token_p99_ms for our, their in pairs),
        "inter_token_p50": median(our.inter_token_p50_ms / their.inter_token_p50_ms for our, their in pairs),
    }


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: median(row[name] for row in rows) for name in rows[0]}


def measure_http_over_engine(
    stage: Stage, sizes: ServingSizes, endpoint: Endpoint, chosen: Sequence[Selection], floor: Floor, rounds: int
) -> dict[str, Any]:
    """The same closed loop over HTTP and on an engine in this process, in turn; both have answered as much before.

    The clients share the processor with the server, and are in what HTTP costs.
    """
    registry = stage.registry()

    def warm_and_time(ask: Ask, turn: int) -> Latencies:
        closed_loop(ask, make_requests(sizes, chosen, f"http-warm-{turn}"), sizes.clients)
        return Latencies.of(closed_loop(ask, make_requests(sizes, chosen, f"http-{turn}"), sizes.clients))

    def over_http(turn: int) -> Latencies:
        return warm_and_time(endpoint.ask, turn)

    def on_engine(turn: int) -> Latencies:
        with running_engine(stage, registry, sizes.clients) as engine:
            return warm_and_time(partial(ask_engine, engine), turn)

    seen: dict[str, list[Latencies]] = {"http": [], "engine": []}
    for turn in range(rounds):
        for name, run in rotated([("http", over_http), ("engine", on_engine)], turn):
            seen[name].append(run(turn))
    pairs = list(zip(seen["http"], seen["engine"], strict=True))
    return {
        **{name: medians([asdict(one) for one in latencies]) for name, latencies in seen.items()},
        "floor": floor.of(make_requests(sizes, chosen, "http-0"), sizes.clients),
        "wall": median(engine.tokens_per_s / http.tokens_per_s for http, engine in pairs),
    }


async def ask_engine(engine: Engine, request: GenerationRequest) -> Stream:
    """What `Endpoint.ask` does, without HTTP. Raises RuntimeError for a request that fails."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Event] = loop.create_future()
    tokens: list[int] = []
    times: list[float] = []

    def take(event: Event) -> None:
        """Called on the engine's thread."""
        if isinstance(event, TokenEvent):
            tokens.extend(event.token_ids)
            times.extend([time.perf_counter()] * len(event.token_ids))
        else:
            loop.call_soon_threadsafe(ended.set_result, event)

    asked = time.perf_counter()
    engine.submit([request], take)
    if not isinstance(event := await ended, FinishedEvent):
        raise RuntimeError(f"{request.request_id} failed: {event}")
    return Stream(asked, tuple(tokens), tuple(times))
