"""A client of a server's adapters: what it has, and uploads, tried again when the server is busy or out of reach."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from adapters.split_file import open_file
from service.commands import CommandError

TRIES = 5
LONGEST_WAIT_S = 30.0
_FIRST_WAIT_S = 0.5
_TIMEOUT = httpx.Timeout(10, read=300, write=60)  # the server checks an adapter whole before it answers
_RETRIED = frozenset({429, 503})
_NOT_RETRIED = "adapter_unavailable"  # a 503 that stays one: the adapter itself cannot be served


class ApiRefusal(CommandError):
    """The server answered with an error. `code` is its envelope's, empty if it sent none."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{message} ({code or status})")
        self.status = status
        self.code = code


class AdapterClient:
    """Talks to one server. Threads may share it. `sleep` waits between tries, for seconds."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        *,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(
            base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=_TIMEOUT, transport=transport
        )
        self._sleep = sleep

    def close(self) -> None:
        self._http.close()

    def check(self) -> None:
        """Raises CommandError unless the server can be reached and lets us in."""
        self._send("GET", "/v1/adapters", params={"limit": 1})

    def digest(self, name: str) -> str | None:
        """The digest of an adapter's current version, None if there is no such adapter. Raises CommandError."""
        try:
            return str(self._send("GET", f"/v1/adapters/{quote(name, safe='')}")["digest"])
        except ApiRefusal as error:
            if error.code == "adapter_not_found":
                return None
            raise

    def upload(self, name: str, parts: Mapping[str, Path], *, replace: bool) -> str:
        """Sends files, by the names of their parts; the digest of what the server stored. Raises CommandError."""
        params = {"replace": "true"} if replace else {}
        return str(self._send("POST", "/v1/adapters", parts, params=params, data={"name": name})["digest"])

    def _send(self, method: str, path: str, parts: Mapping[str, Path] | None = None, **options: Any) -> dict[str, Any]:
        """The answer's JSON, after as many tries as it takes or is worth."""
        waited = _FIRST_WAIT_S
        for last in (*[False] * (TRIES - 1), True):
            wait = waited
            try:
                response = self._try(method, path, parts or {}, options)
            except httpx.TransportError as error:
                if last:
                    raise CommandError(
                        f"{self._http.base_url} cannot be reached: {error}; start a server there, or check the address"
                    ) from error
            else:
                if response.is_success:
                    return _object(response)
                refusal = _refusal(response)
                if last or response.status_code not in _RETRIED or refusal.code == _NOT_RETRIED:
                    raise refusal
                wait = _retry_after(response, waited)
            self._sleep(min(wait, LONGEST_WAIT_S))
            waited *= 2
        raise AssertionError("the last try returns or raises")

    def _try(self, method: str, path: str, parts: Mapping[str, Path], options: Mapping[str, Any]) -> httpx.Response:
        with ExitStack() as opened:
            files = {part: (path.name, opened.enter_context(open_file(path))) for part, path in parts.items()}
            return self._http.request(method, path, files=files or None, **options)


def _retry_after(response: httpx.Response, otherwise: float) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else otherwise


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CommandError(f"{response.url} answers no JSON object: is it a vblora-serve server?")
    return value


def _refusal(response: httpx.Response) -> ApiRefusal:
    try:
        error = response.json()["error"]
        return ApiRefusal(response.status_code, str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return ApiRefusal(response.status_code, "", f"{response.url} answers {response.reason_phrase or 'an error'}")
