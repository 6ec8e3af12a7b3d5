"""What web pages of other sites have a browser send: it asks nobody first, it only keeps the answer from the page."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import ApiError, ErrorResponse
from service.api.keys import KeyRing

_LOOKING = frozenset({"GET", "HEAD", "OPTIONS"})


class ForeignPages:
    """Refuses it on a server that asks for no key, which such a page does not have, unless it only looks.

    Browsers tell of it in a header that no page can set. Pages of `origins`, and of the same site, are no strangers.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, origins: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._keys or scope["method"] in _LOOKING or self._knows(Headers(scope=scope)):
            return await self._app(scope, receive, send)
        message = "a web page of another site sent this: start the server with a --cors-origin for it, or with API keys"
        return await ErrorResponse(ApiError("forbidden", message))(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        if headers.get("sec-fetch-site") != "cross-site":
            return True
        return "*" in self._origins or headers.get("origin") in self._origins
