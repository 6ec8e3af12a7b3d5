"""Every error that leaves the server, rendered in one place.

Errors come here as what they are: an AdapterError or an EngineError by the `code` it carries, a FailedEvent, a request
that does not validate, a route that does not exist, or an exception nobody expected. Each becomes an ApiError, and an
ApiError becomes the envelope {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from adapters.errors import AdapterError
from service.api.validation import describe_validation_error
from service.engine.errors import EngineError, Overloaded
from service.engine.events import FailedEvent

log = logging.getLogger(__name__)

STATUS: Mapping[str, int] = {
    "invalid_request": 400,
    "context_length_exceeded": 400,
    "merge_unsupported": 400,
    "wrong_task": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "adapter_not_found": 404,
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "adapter_exists": 409,
    "payload_too_large": 413,
    "unsupported_checkpoint": 415,
    "invalid_safetensors": 422,
    "bad_config": 422,
    "missing_tensor": 422,
    "unexpected_tensor": 422,
    "shape_mismatch": 422,
    "bad_index": 422,
    "bad_weights": 422,
    "non_finite": 422,
    "no_target_matched": 422,
    "base_model_mismatch": 422,
    "overloaded": 429,
    "internal_error": 500,
    "adapter_unavailable": 503,
    "engine_unavailable": 503,
    "store_unavailable": 503,
    "storage_full": 507,
}

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
_RETRY_AFTER_S = 1
CLIENT_DISCONNECTED = "client_disconnected"  # for the access log and the metrics alone
_CLIENT_CLOSED_REQUEST = 499  # nginx's number
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}


class ApiError(HTTPException):
    """An error as clients see it. `code` decides the status.

    An HTTPException, because that is what FastAPI lets through while it reads a body.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status or STATUS.get(code, 500), message, headers)
        self.code = code
        self.message = message
        self.param = param

    @property
    def type(self) -> str:
        if self.status_code >= 500:
            return "server_error"
        return _TYPES.get(self.status_code, "invalid_request_error")

    def envelope(self) -> dict[str, Any]:
        error = {"message": _printable(self.message), "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**error, "param": None if self.param is None else _printable(self.param)}}


class ErrorResponse(Response):
    """An ApiError on the wire. Its code is left in the scope, where the access log and the metrics find it."""

    media_type = "application/json"

    def __init__(self, error: ApiError) -> None:
        headers = dict(error.headers or {})
        if error.code == "overloaded":
            headers.setdefault("Retry-After", str(_RETRY_AFTER_S))
        super().__init__(json.dumps(error.envelope(), ensure_ascii=False), error.status_code, headers)
        self._code = error.code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_error(scope, self._code)
        await super().__call__(scope, receive, send)


def note_error(scope: Scope, code: str) -> None:
    """Leaves an error's code where the context middleware looks for it."""
    scope.setdefault("state", {})["error_code"] = code


def api_error(error: Exception, request_id: str) -> ApiError:
    """What a client is told about an exception. What it must not see is logged under the request's id instead."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return ApiError(error.code, error.message, headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, EngineError) and error.code != "internal_error":
        return ApiError(error.code, error.message, param=error.param)
    if isinstance(error, AdapterError) and error.code != "internal_error":
        return ApiError(error.code, error.message, param=error.subject)
    log.error("request %s failed: %s", request_id, error, exc_info=error, extra={"request_id": request_id})
    return ApiError("internal_error", f"the server failed to answer; its log says why, under request id {request_id}")


def failed(event: FailedEvent) -> ApiError:
    """A request that the engine had accepted and could not answer."""
    return ApiError(event.code, event.message)


def install_error_handlers(app: FastAPI) -> None:
    """Everything that a route raises on purpose. What it does not, the context middleware catches."""

    async def render(request: Request, error: Exception) -> Response:
        return ErrorResponse(api_error(error, request_id_of(request.scope)))

    app.exception_handler(AdapterError)(render)
    app.exception_handler(EngineError)(render)
    app.exception_handler(HTTPException)(_render_http_exception)
    app.exception_handler(RequestValidationError)(_render_validation_error)
    app.exception_handler(ClientDisconnect)(_render_nothing)


def request_id_of(scope: Scope) -> str:
    return str(scope.get("state", {}).get("request_id", "-"))


async def _render_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own refusals, and ApiErrors."""
    assert isinstance(error, HTTPException)
    return ErrorResponse(error if isinstance(error, ApiError) else _framework_error(request, error))


def _framework_error(request: Request, error: HTTPException) -> ApiError:
    route = f"{request.method} {request.url.path}"
    messages = {
        404: f"there is no route {route}; /docs lists the routes",
        405: f"{route} is not allowed; the Allow header lists the methods",
        400: "the request body cannot be read: send valid JSON in UTF-8",
    }
    code = _CODES.get(error.status_code, "invalid_request" if error.status_code < 500 else "internal_error")
    message = messages.get(error.status_code, str(error.detail))
    headers = {"Allow": ", ".join(_allowed(request))} if error.status_code == 405 else error.headers
    return ApiError(code, message, status=error.status_code, headers=headers)


def _allowed(request: Request) -> list[str]:
    """All methods of the request's path: the framework names only those of the first of its routes."""
    asked = ({**request.scope, "method": method} for method in _METHODS)
    return [scope["method"] for scope in asked if any(r.matches(scope)[0] is Match.FULL for r in request.app.routes)]


async def _render_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = describe_validation_error(error.errors())
    return ErrorResponse(ApiError("invalid_request", message, param=param))


async def _render_nothing(request: Request, error: Exception) -> Response:
    note_error(request.scope, CLIENT_DISCONNECTED)
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


def _printable(text: str) -> str:
    """A client's text may hold lone surrogates, which no encoding can send back."""
    return text.encode("utf-8", "backslashreplace").decode()
