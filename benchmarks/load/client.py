"""Who asks: clients that hold the server to its promise that every request ends, and ends once.

An answer is whole, or a stream that ends with [DONE] or with an `error` event and nothing after it; a refusal is a 429
that says when to come back. Whatever else comes is a ContractBroken, not an outcome.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import httpx

from benchmarks.load.plan import Ask

_PATIENCE_S = 300.0  # an answer that takes longer never comes


class ContractBroken(Exception):
    """The server said something that the API does not allow."""


class Ending(StrEnum):
    """ANSWERED to the end; FAILED with an error, before or within a stream; REFUSED with 429; LEFT by the client."""

    ANSWERED = "answered"
    FAILED = "failed"
    REFUSED = "refused"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended. `code` is that of the error's envelope; `asked` and `ended` are of `time.monotonic`.

    `texts` are the choices' texts by index, as far as they came.
    """

    ask: Ask
    ending: Ending
    asked: float
    ended: float
    status: int | None = None
    code: str | None = None
    digest: str | None = None
    texts: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return self.ended - self.asked


class LoadClient:
    """Asks one server, over as many connections as it takes.

    async with LoadClient(url) as client:
        outcomes = await client.run(asks, at_once=32)
    """

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self.http = httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S, limits=limits, trust_env=False)

    async def __aenter__(self) -> LoadClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.http.aclose()

    async def run(
        self, asks: Iterable[Ask], at_once: int, *, seen: Callable[[Outcome], None] = lambda outcome: None
    ) -> list[Outcome]:
        """The outcome of every request, in their order; so many are under way at a time."""
        slots = asyncio.Semaphore(at_once)

        async def one(ask: Ask) -> Outcome:
            async with slots:
                outcome = await self.ask(ask)
            seen(outcome)
            return outcome

        return list(await asyncio.gather(*map(one, asks)))

    async def ask(self, ask: Ask) -> Outcome:
        exchange = _Exchange(ask)
        leaving = ask.leaving
        try:
            async with asyncio.timeout(None if leaving is None else leaving.seconds):
                await exchange.run(self.http)
        except TimeoutError:
            exchange.ending = Ending.LEFT
        return exchange.outcome()


class _Exchange:
    """One request and what comes back, as far as it came."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._asked = time.monotonic()
        self._texts: dict[int, str] = {}
        self._response: httpx.Response | None = None
        self.ending: Ending | None = None
        self.code: str | None = None

    def outcome(self) -> Outcome:
        assert self.ending is not None
        return Outcome(
            self._ask,
            self.ending,
            self._asked,
            time.monotonic(),
            None if self._response is None else self._response.status_code,
            self.code,
            None if self._response is None else self._response.headers.get("x-adapter-digest"),
            tuple(self._texts[index] for index in sorted(self._texts)),
        )

    async def run(self, http: httpx.AsyncClient) -> None:
        headers = {"x-request-id": self._ask.name}
        async with http.stream("POST", self._ask.path, json=dict(self._ask.body), headers=headers) as response:
            self._response = response
            if response.headers.get("x-request-id") != self._ask.name:
                raise self._broken("its X-Request-ID is not what was sent")
            if response.status_code != 200:
                self._refused(response, await response.aread())
            elif self._ask.streams:
                await self._read_stream(response)
            else:
                self._take(json.loads(await response.aread()), whole=True)
                self.ending = Ending.ANSWERED

    def _refused(self, response: httpx.Response, body: bytes) -> None:
        self.code = json.loads(body)["error"]["code"]
        self.ending = Ending.REFUSED if response.status_code == 429 else Ending.FAILED
        if response.status_code == 429 and int(response.headers.get("retry-after", "0")) < 1:
            raise self._broken("a refusal does not say when to come back")

    async def _read_stream(self, response: httpx.Response) -> None:
        """Event by event, each of lines up to an empty one."""
        most = None if self._ask.leaving is None else self._ask.leaving.events
        count, lines = 0, list[str]()
        async for line in response.aiter_lines():
            if line:
                lines.append(line)
                continue
            if self.ending is not None:
                raise self._broken("something follows the end of the stream")
            self._take_event(lines)
            count, lines = count + 1, []
            if count == most:
                self.ending = Ending.LEFT
                return
        if self.ending is None:
            raise self._broken("the stream broke off, without [DONE] and without an error")

    def _take_event(self, lines: Sequence[str]) -> None:
        if lines == ["data: [DONE]"]:
            self.ending = Ending.ANSWERED
        elif lines[0] == "event: error":
            self.code = json.loads(lines[1].removeprefix("data: "))["error"]["code"]
            self.ending = Ending.FAILED
        else:
            (line,) = lines
            self._take(json.loads(line.removeprefix("data: ")), whole=False)

    def _take(self, body: dict[str, Any], *, whole: bool) -> None:
        for choice in body["choices"]:
            if whole and choice["finish_reason"] is None:
                raise self._broken("a whole answer holds a choice that has not ended")
            part = choice.get("message" if whole else "delta") or {"content": choice.get("text")}  # a chat's, or not
            self._texts[choice["index"]] = self._texts.get(choice["index"], "") + (part.get("content") or "")

    def _broken(self, what: str) -> ContractBroken:
        return ContractBroken(f"{self._ask.name} ({self._ask.path}): {what}")


def by_ending(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many there are of each, those with an error by its code."""
    return dict(Counter(outcome.code or str(outcome.ending) for outcome in outcomes))
