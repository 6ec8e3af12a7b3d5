"""Server-sent events: frames, and a response that stops when its client leaves or its content fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.disconnect import unless_disconnected
from service.api.errors import CLIENT_DISCONNECTED, ApiError, api_error, note_error, request_id_of

DONE = "data: [DONE]\n\n"

# Lines of events end with \n or \r, but many clients split at whatever Unicode calls a line's end. JSON leaves these as
# they are; the others are control characters, which it escapes.
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})


def data_frame(payload: str) -> str:
    """One event whose data is a line of JSON, to clients with any notion of a line."""
    return f"data: {payload.translate(_LINE_ENDS)}\n\n"


def error_frame(error: ApiError) -> str:
    return f"event: error\n{data_frame(json.dumps(error.envelope(), ensure_ascii=False))}"


class EventSourceResponse(Response):
    """Sends frames as they come. A failure of the content is an `error` event and the end, without [DONE].

    `on_close` is called once, however the response ends, begun or not.
    """

    media_type = "text/event-stream"

    def __init__(
        self, frames: AsyncGenerator[str, None], *, headers: Mapping[str, str], on_close: Callable[[], None]
    ) -> None:
        super().__init__(None, headers=headers)
        del self.headers["content-length"]
        MutableHeaders(raw=self.raw_headers).update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._frames = frames
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_all(scope, send))
        except (ClientDisconnect, OSError):
            note_error(scope, CLIENT_DISCONNECTED)
        finally:
            self._on_close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._frames):
            try:
                async for frame in self._frames:
                    await _send_frame(send, frame)
                    # The next may be there already, and thousands more: others, and the news that the client has left,
                    # get their turn in between.
                    await asyncio.sleep(0)
            except OSError:
                raise  # the server's way to say that the client has gone
            except Exception as error:
                problem = api_error(error, request_id_of(scope))
                note_error(scope, problem.code)
                await _send_frame(send, error_frame(problem))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_frame(send: Send, frame: str) -> None:
    await send({"type": "http.response.body", "body": frame.encode(), "more_body": True})
