"""The outermost layer: a request's id, one line in the access log, and its metrics."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.deps import RequestMetrics
from service.api.keys import key_of
from service.api.observation import access_fields

access_log = logging.getLogger("vblora.access")

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_NOTHING_SENT = 499


class RequestContext:
    """Gives every request an id, or takes the client's if it is sane."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = _Exchange(send, request_id)
        try:
            await self._app(scope, receive, exchange.send)
        finally:
            self._record(scope, exchange, request_id)

    def _record(self, scope: Scope, exchange: _Exchange, request_id: str) -> None:
        seconds = time.perf_counter() - exchange.began
        status = exchange.status or _NOTHING_SENT
        code = scope["state"].get("error_code")
        self._metrics.observe_request(getattr(scope.get("route"), "path", "unmatched"), status, seconds)
        if code is not None:
            self._metrics.count_error(code)
        key = key_of(scope)
        fields = {"method": scope["method"], "path": scope["path"], "status": status, "code": code}
        fields |= {"key": None if key is None else key.name, "tenant": None if key is None else key.tenant or None}
        fields |= {"duration_s": round(seconds, 6)} | access_fields(scope)
        access_log.info("request", extra={"request_id": request_id, **fields})


class _Exchange:
    """The sending side of one exchange: adds the id and what a cache and a browser may make of it; has the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.began = time.perf_counter()
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._request_id
            headers.setdefault("Cache-Control", "no-store")  # the next who asks may have another key
            headers.setdefault("X-Content-Type-Options", "nosniff")
        await self._send(message)


def _request_id(scope: Scope) -> str:
    offered = Headers(scope=scope).get("x-request-id", "")
    return offered if _SANE_ID.fullmatch(offered) else uuid.uuid4().hex
