"""How large a request's body may be, and how long it may take to arrive."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.deps import ApiSettings
from service.api.errors import ApiError, ErrorResponse
from service.api.middleware.paths import route_path

UPLOAD_PATH = "/v1/adapters"
_MOST_DIGITS = 15


class BodyLimits:
    """Refuses a body that declares too much at once, and one that turns out too large or too slow as it is read."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        body = self._limited(scope, headers, receive)
        if _declares_more(headers.get("content-length", ""), body.limit):
            return await ErrorResponse(body.too_large())(scope, receive, send)
        return await self._app(scope, body.receive, send)

    def _limited(self, scope: Scope, headers: Headers, receive: Receive) -> _LimitedBody:
        settings = self._settings
        is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        if is_form and scope["method"] == "POST" and route_path(scope) == UPLOAD_PATH:
            return _LimitedBody(receive, settings.max_upload_bytes, settings.upload_timeout_s)
        return _LimitedBody(receive, settings.max_body_bytes, settings.body_timeout_s)


class _LimitedBody:
    """One request's body. The deadline runs from the first read, and ends with the body."""

    def __init__(self, receive: Receive, limit: int, timeout_s: float) -> None:
        self._receive = receive
        self.limit = limit
        self._timeout_s = timeout_s
        self._deadline: float | None = None
        self._received = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()  # what is left to come is the client's leaving
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise self._too_slow() from None
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._received > self.limit:
            raise self.too_large()
        return message

    def too_large(self) -> ApiError:
        return ApiError(
            "payload_too_large",
            f"the body is larger than the {self.limit:,} bytes that this server takes on this route: send less",
        )

    def _too_slow(self) -> ApiError:
        return ApiError(
            "request_timeout", f"the body did not arrive within {self._timeout_s:g} seconds; send it again, faster"
        )


def _declares_more(content_length: str, limit: int) -> bool:
    return content_length.isdecimal() and (len(content_length) > _MOST_DIGITS or int(content_length) > limit)
