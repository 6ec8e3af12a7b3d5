"""One HTTP exchange driven by hand: the body sent in pieces, the response read as it is sent, the client leaving."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import ASGIApp, Message

WAIT_S = 20  # for what should take milliseconds


class Exchange:
    """The app receives what `send_body` and `leave` put there, and sends what `next_message` returns.

    `reads` counts how often the app asked for more of the request; `wants_more` is set once there was no more; `error`
    is what the app raised.
    """

    def __init__(self) -> None:
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._outgoing: asyncio.Queue[Message] = asyncio.Queue()
        self.reads = 0
        self.wants_more = asyncio.Event()
        self.unreachable = False
        self.error: Exception | None = None
        self.ended = asyncio.Event()

    def send_body(self, data: bytes, *, more: bool = False) -> None:
        self._incoming.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def next_message(self) -> Message:
        async with asyncio.timeout(WAIT_S):
            return await self._outgoing.get()

    async def status(self) -> int:
        message = await self.next_message()
        assert message["type"] == "http.response.start"
        return int(message["status"])

    async def text(self) -> str:
        """The next piece of the body."""
        message = await self.next_message()
        assert message["type"] == "http.response.body"
        return str(message["body"].decode())

    async def error_code(self) -> str:
        return str(json.loads(await self.text())["error"]["code"])

    async def end(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.ended.wait()

    async def receive(self) -> Message:
        self.reads += 1
        if self._incoming.empty():
            self.wants_more.set()
        return await self._incoming.get()

    async def send(self, message: Message) -> None:
        if self.unreachable:
            raise OSError("the client has gone")
        self._outgoing.put_nowait(message)


@asynccontextmanager
async def exchange(
    app: ASGIApp, method: str, path: str, *, body: Any = None, headers: dict[str, str] | None = None
) -> AsyncIterator[Exchange]:
    """Starts the exchange. With `body`, it is sent whole as JSON."""
    own = Exchange()
    given = {"content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    if body is not None:
        own.send_body(json.dumps(body).encode())

    async def run() -> None:
        try:
            await app(scope, own.receive, own.send)
        except Exception as error:
            own.error = error
        finally:
            own.ended.set()

    task = asyncio.create_task(run())
    try:
        yield own
        await own.end()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
