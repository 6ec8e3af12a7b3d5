"""API keys, checked before a byte of any body is read: whether there is one, what it allows, and how much of it."""

from __future__ import annotations

from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.access import Access, access_to, is_metered
from service.api.errors import ApiError, ErrorResponse
from service.api.key_limits import KeyLimits
from service.api.keys import ApiKey, KeyRing
from service.api.middleware.paths import route_path


class Authentication:
    """Asks for `Authorization: Bearer <key>` on every path that is not public, known route or not.

    Leaves the key in the scope's state. Without any key to know, every path is open.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, *, metrics_public: bool) -> None:
        self._app = app
        self._keys = keys
        self._metrics_public = metrics_public
        self._limits = KeyLimits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys:
            return await self._app(scope, receive, send)
        access = access_to(scope["method"], route_path(scope), metrics_public=self._metrics_public)
        if access is Access.PUBLIC:
            return await self._app(scope, receive, send)
        with ExitStack() as used:
            try:
                key = self._authenticate(scope)
                scope.setdefault("state", {})["key"] = key
                _check_scope(key, access)
                if is_metered(route_path(scope)):
                    used.enter_context(self._limits.using(key))
            except ApiError as refusal:
                return await ErrorResponse(refusal)(scope, receive, send)
            return await self._app(scope, receive, send)

    def _authenticate(self, scope: Scope) -> ApiKey:
        offered = _bearer(Headers(scope=scope))
        key = None if offered is None else self._keys.find(offered)
        if key is None:
            raise _unauthorized(offered is not None)
        return key


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


def _check_scope(key: ApiKey, access: Access) -> None:
    if access.scope is not None and access.scope not in key.scopes:
        raise ApiError("forbidden", f"this API key does not allow it: use one with the scope {access.scope.value!r}")
