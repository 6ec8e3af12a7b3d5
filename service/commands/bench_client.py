"""Asks a server: what it serves, how it counts tokens, and the requests that are measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import httpx

from service.commands import CommandError
from service.commands.bench_answers import Answer, AnswerFailed, Dialect, StreamReader, error_of, read_answer
from service.commands.bench_plan import WORDS, Ask

BASE = "base"
_PREFLIGHT_S = 30.0
_RETRY_AFTER_S = 1.0  # where a refusal does not say
_LEAST_WAIT_S, _MOST_WAIT_S = 0.1, 60.0  # whatever it says: a measurement does not sleep until tomorrow


class Ending(StrEnum):
    """OK: answered to the end. REFUSED: with 429. FAILED: everything else."""

    OK = "ok"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request; times are of `time.perf_counter`. `answer` is there if it is OK, else the `code`.

    `retry_after_s` is what a refusal asked for.
    """

    ask: Ask
    asked: float
    ended: float
    ending: Ending
    answer: Answer | None = None
    code: str | None = None
    message: str = ""
    retries: int = 0
    retry_after_s: float = 0.0


class _Refused(AnswerFailed):
    def __init__(self, error: AnswerFailed, retry_after_s: float) -> None:
        super().__init__(error.code, str(error))
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Manner:
    """How requests are made: `timeout_s` is for one with all its retries, which are of refusals alone."""

    dialect: Dialect
    timeout_s: float
    retry: bool
    ignore_eos: bool


class BenchClient:
    """Talks to one server, over as many connections as it takes.

    async with BenchClient(url, key, manner) as client:
        outcome = await client.ask(ask)
    """

    def __init__(
        self, url: str, api_key: str | None, manner: Manner, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._url = url.rstrip("/").removesuffix("/v1")
        # No proxy of the environment's: what is measured is the server.
        self._http = httpx.AsyncClient(
            base_url=self._url, headers=headers, timeout=None, limits=limits, trust_env=False, transport=transport
        )
        self._manner = manner

    async def __aenter__(self) -> BenchClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def served(self) -> list[str]:
        """What the server says can be asked for, the base among it. Raises CommandError if it does not say."""
        if self._manner.dialect is Dialect.OPENAI:
            return self._names(await self._preflight("GET", "/v1/models"), "/v1/models", "id")
        names, after = {BASE: None}, None
        while True:
            page, before = await self._preflight("GET", "/v1/adapters", params=after and {"after": after}), len(names)
            names.update(dict.fromkeys(self._names(page, "/v1/adapters", "name")))
            after = page.get("next")
            if after is None or len(names) == before:  # a page with nothing new would come again and again
                return list(names)

    def _names(self, page: Mapping[str, Any], path: str, field: str) -> list[str]:
        try:
            return [str(each[field]) for each in page["data"]]
        except (KeyError, TypeError) as error:
            raise CommandError(f"{self._url}{path} does not list what it serves: {self._other_dialect()}") from error

    async def token_pool(self, model: str) -> list[int]:
        """Token ids of ordinary words; empty if the server does not tell how it cuts text."""
        body = {"prompt": " ".join(WORDS), "add_special_tokens": False}
        if self._manner.dialect is Dialect.OPENAI:
            body["model"] = model
        try:
            return sorted(set((await self._preflight("POST", "/tokenize", json=body))["tokens"]))
        except (CommandError, KeyError, TypeError):
            return []

    async def _preflight(self, method: str, path: str, **options: Any) -> Mapping[str, Any]:
        try:
            response = await self._http.request(method, path, timeout=_PREFLIGHT_S, **options)
            body = response.json()
        except (httpx.RequestError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise CommandError(
                f"no server answers at {self._url}: {reason}; start one with vblora-serve serve, or check the address"
            ) from error
        except (ValueError, RecursionError):
            body = None
        if response.is_success and isinstance(body, dict):
            return body
        if response.status_code == 404 or response.is_success:
            raise CommandError(f"{self._url} does not answer {path}: {self._other_dialect()}")
        refusal = error_of(body, f"http_{response.status_code}")
        advice = "; give a key with --api-key-file or VBLORA_API_KEY" if response.status_code in (401, 403) else ""
        raise CommandError(f"{self._url}{path} answers {response.status_code} ({refusal.code}): {refusal}{advice}")

    def _other_dialect(self) -> str:
        if self._manner.dialect is Dialect.NATIVE:
            return "is it a vblora-serve? Give --api openai for other servers"
        return "is it an OpenAI-compatible server?"

    async def ask(self, ask: Ask) -> Outcome:
        """Asks, and asks again as long as the server is busy if that is wanted. Raises nothing of the server's."""
        asked, retries = time.perf_counter(), 0

        def outcome(ending: Ending, error: AnswerFailed | None = None, answer: Answer | None = None) -> Outcome:
            code, message = (None, "") if error is None else (error.code, str(error))
            wait = error.retry_after_s if isinstance(error, _Refused) else 0.0
            return Outcome(ask, asked, time.perf_counter(), ending, answer, code, message, retries, wait)

        try:
            async with asyncio.timeout(self._manner.timeout_s):
                while True:
                    try:
                        return outcome(Ending.OK, answer=await self._answer(ask))
                    except _Refused as refused:
                        if not self._manner.retry:
                            return outcome(Ending.REFUSED, refused)
                        retries += 1
                        await asyncio.sleep(refused.retry_after_s)
        except AnswerFailed as error:
            return outcome(Ending.FAILED, error)
        except httpx.RequestError as error:
            failure = AnswerFailed("connection", str(error) or type(error).__name__)
            return outcome(Ending.FAILED, failure)
        except TimeoutError:
            return outcome(Ending.FAILED, AnswerFailed("timeout", f"no answer within {self._manner.timeout_s:g} s"))

    async def _answer(self, ask: Ask) -> Answer:
        dialect = self._manner.dialect
        body = dialect.body(ask, ignore_eos=self._manner.ignore_eos)
        reader = StreamReader(time.perf_counter)
        async with self._http.stream("POST", dialect.path, json=body) as response:
            if response.status_code != 200:
                raise await _refusal(response)
            async for data in response.aiter_bytes():
                reader.feed(data)
        return read_answer(reader.events, dialect)


async def _refusal(response: httpx.Response) -> AnswerFailed:
    await response.aread()
    try:
        body = response.json()
    except (ValueError, RecursionError):
        body = None
    error = error_of(body, f"http_{response.status_code}")
    if response.status_code != 429:
        return error
    after = response.headers.get("retry-after", "")
    wait = float(after) if after.isdecimal() else _RETRY_AFTER_S
    return _Refused(error, min(max(wait, _LEAST_WAIT_S), _MOST_WAIT_S))
