"""The whole app within a replica's process: a request goes in, batches of messages come out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from anyio import to_thread
from starlette.types import ASGIApp, Scope
from starlette.types import Message as AsgiMessage

from adapters.errors import StoreError
from service.api.deps import ServerState
from service.api.middleware.uncaught import UncaughtErrors
from service.api.observation import access_fields
from service.app import create_routes
from service.cluster.messages import Forwarded, Head, Message, Tail

_UNSENT_MESSAGES = 256  # then the app waits, as it would for a socket

Load = Callable[[Any], Awaitable[bytes]]
"""A piece of a body from what stands for it."""


class Replica:
    """Answers for one server. `load` brings the pieces of bodies. For one event loop."""

    def __init__(self, state: ServerState, load: Load) -> None:
        app = create_routes(state)
        app.add_middleware(UncaughtErrors)
        self._app: ASGIApp = app
        self._store = state.store
        self._load = load
        self._seen: dict[str, int] = {}
        self._catching_up = asyncio.Lock()

    async def answer(self, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        """Everything that the app sends, as much as there is each time. Closing it tells the app that its client has
        left, and waits until it has ended.
        """
        await self._catch_up(*request.seen)
        scope = {**request.scope, "state": {"request_id": request.request_id, "key": request.key}}
        exchange = _Exchange(request.body, self._load)
        running = asyncio.create_task(exchange.run(self._app, scope))
        try:
            async for messages in exchange.batches():
                yield messages
            await running
            yield [_tail(scope)]
        finally:
            exchange.leave()
            await asyncio.gather(running, return_exceptions=True)

    async def _catch_up(self, ingress: str, changes: int) -> None:
        """What was changed through that ingress before it sent this request is known here before it is answered."""
        refresh = getattr(self._store, "refresh", None)
        if refresh is None or self._seen.get(ingress, 0) >= changes:
            return
        async with self._catching_up:  # one for all that wait
            if self._seen.get(ingress, 0) >= changes:
                return
            with suppress(StoreError):  # counted by the store; what is known here is served on
                await to_thread.run_sync(refresh)
            self._seen[ingress] = changes  # even so: a store that does not answer is not asked for every request


def _tail(scope: Scope) -> Tail:
    route = getattr(scope.get("route"), "path", "unmatched")
    fields = {name: value for name, value in access_fields(scope).items() if value is not None}
    return Tail(route, scope["state"].get("error_code"), fields)


class _Exchange:
    """Both ends of one call of the app."""

    def __init__(self, body: Sequence[Any], load: Load) -> None:
        self._pieces: Iterator[Any] = iter(body)
        self._left = len(body)
        self._load = load
        self._asked = False
        self._leaving = asyncio.Event()
        self._sent: asyncio.Queue[Message | None] = asyncio.Queue(_UNSENT_MESSAGES)

    async def run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self._receive, self._send)
        finally:
            if not self._leaving.is_set():
                await self._sent.put(None)

    async def _receive(self) -> AsgiMessage:
        if self._left or not self._asked:
            self._asked = True
            data = await self._load(next(self._pieces)) if self._left else b""
            self._left = max(0, self._left - 1)
            return {"type": "http.request", "body": data, "more_body": self._left > 0}
        await self._leaving.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: AsgiMessage) -> None:
        if self._leaving.is_set():
            return  # as servers do: that the client has gone is told by what is received
        if message["type"] == "http.response.start":
            await self._sent.put(Head(message["status"], [(bytes(k), bytes(v)) for k, v in message["headers"]]))
        elif message.get("body"):
            await self._sent.put(bytes(message["body"]))

    async def batches(self) -> AsyncGenerator[list[Message], None]:
        """Until the app has ended."""
        while (message := await self._sent.get()) is not None:
            batch = [message]
            while not self._sent.empty():
                if (message := self._sent.get_nowait()) is None:
                    yield batch
                    return
                batch.append(message)
            yield batch

    def leave(self) -> None:
        """The client is gone: nothing more is taken, so that nothing that is being sent waits."""
        self._leaving.set()
        while not self._sent.empty():
            self._sent.get_nowait()
