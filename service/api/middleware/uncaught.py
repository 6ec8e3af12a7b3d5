"""Errors that nobody caught, answered where a response can still be one."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import ErrorResponse, api_error, request_id_of


class UncaughtErrors:
    """Answers for whatever goes wrong inside. Inside of CORS, whose headers errors need as well."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            response = ErrorResponse(api_error(error, request_id_of(scope)))
            if begun:
                raise  # too late for a response: the server cuts the connection, so that the client notices
            await response(scope, receive, send)
