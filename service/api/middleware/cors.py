"""Cross-origin requests: which web pages a browser lets use this server."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from service.api.errors import ApiError, ErrorResponse

_METHODS = ("GET", "HEAD", "POST", "DELETE")
_EXPOSED = ("X-Request-ID", "X-Adapter-Digest", "Retry-After")


class CrossOrigin(CORSMiddleware):
    """Answers preflights, which carry no API key, and marks every response for pages of these origins.

    No cookie is ever asked for, so that `*` is harmless: whoever calls still needs a key.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app, allow_origins=origins, allow_methods=_METHODS, allow_headers=("*",), expose_headers=_EXPOSED
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        origin, method = request_headers["origin"], request_headers["access-control-request-method"]
        return ErrorResponse(
            ApiError(
                "forbidden",
                f"{method[:20]} requests from pages of {origin[:140]!r} are not allowed here: --cors-origin says which "
                f"origins are; the methods are {', '.join(_METHODS)}",
                headers={"Vary": response.headers["vary"]},
            )
        )
