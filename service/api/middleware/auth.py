"""API keys, checked before a byte of any body is read."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.deps import ApiSettings
from service.api.errors import ApiError, ErrorResponse
from service.api.middleware.paths import route_path

# What a browser or a probe must reach without a key. Pages are public; what they ask the API is not.
PUBLIC_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json", "/favicon.ico"})
PUBLIC_PREFIXES = ("/docs/", "/static/")


def hash_key(key: str) -> str:
    """An API key as settings hold it: its SHA-256, in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


class Authentication:
    """Asks for `Authorization: Bearer <key>` on every path that is not public, known route or not."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._keys = tuple(sorted(settings.api_keys))
        self._public = PUBLIC_PATHS | ({"/metrics"} if settings.metrics_public else frozenset())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and not self._is_public(route_path(scope)):
            offered = _bearer(Headers(scope=scope))
            if offered is None or not self._knows(offered):
                return await ErrorResponse(_unauthorized(offered is not None))(scope, receive, send)
        return await self._app(scope, receive, send)

    def _is_public(self, path: str) -> bool:
        return path in self._public or path.startswith(PUBLIC_PREFIXES)

    def _knows(self, key: str) -> bool:
        """Compares with every key, in the same time whichever it is."""
        offered = hash_key(key)
        return sum(hmac.compare_digest(offered, known) for known in self._keys) > 0


def _bearer(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _unauthorized(offered: bool) -> ApiError:
    wrong = "the API key is not known to this server" if offered else "this server asks for an API key"
    return ApiError(
        "unauthorized",
        f"{wrong}: send a valid one as 'Authorization: Bearer <key>'",
        headers={"WWW-Authenticate": "Bearer"},
    )
