"""Timed streams: greedy requests to a server, in a closed or an open loop, and when each token came.

The client reads sockets itself: it shares the processor with the servers that it measures, and a general HTTP client
takes several times as long over an event as the server that wrote it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from service.commands.bench_figures import quantile
from service.commands.bench_plan import arrivals
from service.engine.sequence import GenerationRequest

_PATIENCE_S = 900.0  # an answer that takes longer never comes
_LINE_LIMIT = 1 << 20


class StreamBroken(Exception):
    """A server refused a request, or its stream ended before [DONE]."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer: its tokens and when each came, by `time.perf_counter`, as `asked` is."""

    asked: float
    tokens: tuple[int, ...]
    times: tuple[float, ...]

    @property
    def first_token_s(self) -> float:
        return self.times[0] - self.asked

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.times)]


Answers = dict[str, Stream]  # by the request's id
Ask = Callable[[GenerationRequest], Awaitable[Stream]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where `POST /v1/generate` is answered with events as this project's server writes them."""

    port: int

    async def ask(self, request: GenerationRequest) -> Stream:
        body = json.dumps(body_of(request)).encode()
        head = f"POST /v1/generate HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        asked = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=_LINE_LIMIT)
        try:
            writer.write(head.encode() + body)
            events = await asyncio.wait_for(_read_events(reader, request), _PATIENCE_S)
        finally:
            writer.close()
        return _stream(asked, events)


def body_of(request: GenerationRequest) -> dict[str, Any]:
    adapters = request.selection.adapters
    return {
        "prompt": list(request.prompt_ids),
        "adapter": adapters[0].name if adapters else "base",
        "max_new_tokens": request.params.max_new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


async def _read_events(reader: asyncio.StreamReader, request: GenerationRequest) -> list[tuple[float, bytes]]:
    """Each event's data and when it came, read after the last: reading must not delay the next.

    A chunk of the body is one event or several, never a part of one, so that the lines between them may be skipped.
    """
    status = await reader.readline()
    if b" 200 " not in status:
        raise StreamBroken(f"{request.request_id}: {status!r} {(await reader.read(2000))!r}")
    events: list[tuple[float, bytes]] = []
    async for line in reader:
        if line.startswith(b"data: "):
            if line.startswith(b"data: [DONE]"):
                await reader.read()  # to the end of the response: a client that leaves before is one that gave up
                return events
            events.append((time.perf_counter(), line.removeprefix(b"data: ")))
        elif line.startswith(b"event: error"):
            raise StreamBroken(f"{request.request_id}: {(await reader.readline())!r}")
    raise StreamBroken(f"{request.request_id}: the stream broke off after {len(events)} events")


def _stream(asked: float, events: Sequence[tuple[float, bytes]]) -> Stream:
    tokens: list[int] = []
    times: list[float] = []
    for when, data in events:
        new = [token for choice in json.loads(data)["choices"] for token in choice["token_ids"]]
        tokens += new
        times += [when] * len(new)
    return Stream(asked, tuple(tokens), tuple(times))


def closed_loop(ask: Ask, requests: Sequence[GenerationRequest], clients: int) -> Answers:
    """So many clients, each of which asks for the next request as soon as its last is answered."""
    return asyncio.run(_closed_loop(ask, requests, clients))


async def _closed_loop(ask: Ask, requests: Sequence[GenerationRequest], clients: int) -> Answers:
    answers: Answers = {}
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:
            answers[request.request_id] = await ask(request)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return answers


def open_loop(ask: Ask, requests: Sequence[GenerationRequest], per_second: float, seed: int | str) -> Answers:
    """Requests that arrive by chance, so many a second on average, whatever became of those before them."""
    return asyncio.run(_open_loop(ask, requests, arrivals(len(requests), per_second, seed)))


async def _open_loop(ask: Ask, requests: Sequence[GenerationRequest], at: Sequence[float]) -> Answers:
    answers: Answers = {}

    async def arrive(request: GenerationRequest, after_s: float) -> None:
        await asyncio.sleep(after_s)
        answers[request.request_id] = await ask(request)

    async with asyncio.TaskGroup() as group:
        for request, after_s in zip(requests, at, strict=True):
            group.create_task(arrive(request, after_s))
    return answers


@dataclass(frozen=True, slots=True)
class Latencies:
    """What the clients of one loop saw."""

    tokens_per_s: float
    first_token_p50_ms: float
    first_token_p99_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float

    @classmethod
    def of(cls, answers: Answers) -> Latencies:
        streams = list(answers.values())
        took = max(stream.times[-1] for stream in streams) - min(stream.asked for stream in streams)
        first = [stream.first_token_s for stream in streams]
        gaps = [gap for stream in streams for gap in stream.gaps_s]
        return cls(
            sum(len(stream.tokens) for stream in streams) / took,
            *(1000 * (quantile(values, share) or 0.0) for values in (first, gaps) for share in (0.5, 0.99)),
        )


def tokens_of(answers: Answers) -> dict[str, tuple[int, ...]]:
    return {name: stream.tokens for name, stream in answers.items()}
