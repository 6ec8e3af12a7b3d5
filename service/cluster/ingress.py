"""The application in front of the replicas: it guards, finds out where a request belongs, and passes its answer on.

It holds no model and keeps nothing: any number of ingresses may stand beside one another. Of a request's body it reads
what says which adapters it is for.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from types import SimpleNamespace
from typing import Any

from anyio import to_thread
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from adapters.errors import StoreError
from adapters.store import SHARED, Store
from service.api.access import Access, access_to
from service.api.deps import ApiSettings
from service.api.disconnect import unless_disconnected
from service.api.errors import CLIENT_DISCONNECTED, ApiError, ErrorResponse, note_error, request_id_of
from service.api.keys import KeyRing, key_of
from service.api.middleware.paths import route_path
from service.api.sse import DONE, error_frame
from service.app import guards
from service.cluster.affinity import affinity_of, generates
from service.cluster.answers import OwnAnswers
from service.cluster.messages import Forwarded, Head, Message, Tail
from service.cluster.metrics import IngressMetrics
from service.cluster.seam import ReplicaLost, Replicas, ReplicasFull
from service.cluster.work import Work

log = logging.getLogger(__name__)

_PIECE_BYTES = 4 << 20  # of a large body: what is held here of it at once
_WHOLE_BYTES = 8 << 20  # what is sent along with a request
_TRAVELLING = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "client",
    "server",
)  # fmt: skip
_RETRY_AFTER_S = 1
_DONE = DONE.encode()
_ATTEMPTS = 2


class Ingress:
    """Everything that a client sees of the replicas. `work` says what is under way."""

    def __init__(
        self, replicas: Replicas, store: Store, keys: KeyRing, settings: ApiSettings, metrics: IngressMetrics
    ) -> None:
        self._replicas = replicas
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._id = secrets.token_hex(8)
        self._changes = 0
        self.work = Work()
        self._own = OwnAnswers(replicas, metrics, settings, self.work)
        app: ASGIApp = self._answer
        for layer in guards(settings, keys, metrics):
            app = layer.cls(app, *layer.args, **layer.kwargs)
        self._guarded = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guarded(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What has passed the guards."""
        own = self._own.route(scope["method"], route_path(scope))
        if own is not None:
            scope["route"] = SimpleNamespace(path=route_path(scope))
            return await (await own(scope))(scope, receive, send)
        try:
            with self.work.counted():
                with self.work.may_be_ended():
                    body = await self._read(receive)
                await unless_disconnected(receive, self._forward(await self._forwarded(scope, body), scope, send))
        except (ClientDisconnect, OSError):
            note_error(scope, CLIENT_DISCONNECTED)

    async def _read(self, receive: Receive) -> tuple[Any, ...]:
        """The body: whole if it is not too large, else in pieces that the replicas can fetch."""
        pieces: list[Any] = []
        buffer = bytearray()
        async for data in _body(receive):
            buffer += data
            if len(buffer) > _WHOLE_BYTES or (pieces and len(buffer) >= _PIECE_BYTES):
                pieces.append(await self._replicas.keep(bytes(buffer)))
                buffer.clear()
        if buffer:
            pieces.append(bytes(buffer))
        return tuple(pieces)

    async def _forwarded(self, scope: Scope, body: tuple[Any, ...]) -> Forwarded:
        key = key_of(scope)
        takes_a_place = generates(scope["method"], route_path(scope))
        if takes_a_place:  # until the replica says it, which one that is lost or full does not
            scope["route"] = SimpleNamespace(path=route_path(scope))
        affinity = None
        if takes_a_place and len(body) == 1:
            tenant = SHARED if key is None else key.tenant
            affinity = await to_thread.run_sync(affinity_of, body[0], tenant, self._store, self._settings)
        travelling = {name: scope[name] for name in _TRAVELLING if name in scope}
        travelling["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        return Forwarded(
            travelling, request_id_of(scope), key, body, affinity, takes_a_place, (self._id, self._changes)
        )

    async def _forward(self, request: Forwarded, scope: Scope, send: Send) -> None:
        """Has it answered, by a second replica if the first is lost before anything was sent and twice does no harm."""
        asked = request.scope["method"], route_path(scope)
        changes = access_to(*asked, metrics_public=False) is Access.ADMIN
        repeatable = not changes
        exchange = _Exchange(scope, send, self._after_change if changes else None)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self.work.may_be_ended():
                    await self._attempt(request, exchange)
            except ReplicasFull:
                await exchange.refuse(_overloaded())
            except ApiError as stopping:
                await exchange.refuse(stopping)
            except ReplicaLost:
                log.warning("lost a replica while it answered", extra={"request_id": request.request_id})
                self._metrics.count_lost()
                if repeatable and not exchange.begun and attempt < _ATTEMPTS:
                    continue
                await exchange.refuse(_lost(repeatable))
            return

    async def _attempt(self, request: Forwarded, exchange: _Exchange) -> None:
        async with aclosing(self._replicas.answer(request)) as batches:
            async for batch in batches:
                await exchange.pass_on(batch)
        await exchange.end()

    async def _after_change(self) -> None:
        """Adapters may have changed: what this ingress sends from now on is to be answered as of now."""
        self._changes += 1
        if (refresh := getattr(self._store, "refresh", None)) is not None:
            with suppress(StoreError):
                await to_thread.run_sync(refresh)


class _Exchange:
    """What a client has been sent so far of an answer."""

    def __init__(self, scope: Scope, send: Send, changed: Callable[[], Awaitable[None]] | None) -> None:
        self._scope = scope
        self._send = send
        self._changed = changed
        self._is_stream = False
        self._held = b""
        self.begun = False

    async def pass_on(self, batch: list[Message]) -> None:
        data = []
        for message in batch:
            if isinstance(message, Head):
                await self._begin(message)
            elif isinstance(message, Tail):
                self._note(message)
            else:
                data.append(message)
        if data:
            await self._pass_on(b"".join(data))

    async def _pass_on(self, data: bytes) -> None:
        """What may be the last is held back until that is known: a client that has it all may leave at once, and is
        not to be taken for one that left too early. Events of a stream are not, but for the one that says it.
        """
        if self._held:
            await self._send(_piece(self._held, more=True))
        self._held = b"" if self._is_stream and not data.endswith(_DONE) else data
        if not self._held:
            await self._send(_piece(data, more=True))

    async def _begin(self, head: Head) -> None:
        if self._changed is not None and head.status < 300:
            await self._changed()
        self.begun = True
        self._is_stream = any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in head.headers
        )
        await self._send({"type": "http.response.start", "status": head.status, "headers": list(head.headers)})

    def _note(self, tail: Tail) -> None:
        self._scope["route"] = SimpleNamespace(path=tail.route)
        self._scope["state"]["observation"] = SimpleNamespace(fields=lambda: tail.fields)
        if tail.error_code is not None:
            note_error(self._scope, tail.error_code)

    async def end(self) -> None:
        await self._send(_piece(self._held, more=False))

    async def refuse(self, error: ApiError) -> None:
        """The error: a response, an event if a stream of events has begun, else a connection that breaks."""
        note_error(self._scope, error.code)
        if not self.begun:
            await ErrorResponse(error)(self._scope, _nothing, self._send)
        elif self._is_stream:
            await self._send(_piece(error_frame(error).encode(), more=False))
        else:
            raise error


async def _body(receive: Receive) -> AsyncGenerator[bytes, None]:
    """Raises ClientDisconnect."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        yield message.get("body", b"")


def _piece(data: bytes, *, more: bool) -> AsgiMessage:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _nothing() -> AsgiMessage:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody sets it")


def _overloaded() -> ApiError:
    return ApiError(
        "overloaded",
        "every replica has as many requests as it takes: try again",
        headers={"Retry-After": str(_RETRY_AFTER_S)},
    )


def _lost(repeatable: bool) -> ApiError:
    then = "try again" if repeatable else "it may or may not have been done: look, and try again"
    return ApiError("engine_unavailable", f"the replica that was to answer ended before it had: {then}")
