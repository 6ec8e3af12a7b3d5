"""`vblora-serve serve`: the HTTP server, from listening to the last request's end."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from adapters.store import Store
from service.api.keys import KeyFileError, KeyRing, load_key_file
from service.app import create_app
from service.assembly import Server, build_server
from service.commands import CommandError
from service.commands.base import check_model
from service.commands.output import say
from service.engine.base_model import BaseModelError
from service.engine.task import Task
from service.logs import setup_logging
from service.settings import Settings, SettingsError

log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than the proxies in front, which would else send on a connection that is being closed
_LONGEST_STALL_S = 86_400  # what a socket option of 32 bits holds, and nobody waits for longer
_LAST_WORDS_S = 5  # after the drain: for responses to reach their clients


def run(settings: Settings) -> int:
    """Serves until SIGTERM or Ctrl-C, then lets running requests end. Raises SettingsError or CommandError."""
    assert settings.model is not None
    check_model(settings.model)
    setup_logging(format=settings.log_format, level=settings.log_level, prompts=settings.log_prompts)
    end_on_sigterm()
    hangups = remember_sighup()
    log.info("settings", extra=settings.shown())
    with listening(settings.host, settings.port) as listener:
        if settings.api_key_file is None and not ip_address(listener.getsockname()[0]).is_loopback:
            log.warning("whoever reaches this address may use the server and change its adapters: set --api-key-file")
        if settings.replicas > 1:
            _run_replicas(settings, listener, hangups)
            log.info("stopped")
            return 0
        started = time.monotonic()
        try:
            server = build_server(settings)
        except BaseModelError as error:
            raise CommandError(str(error)) from error

        def announce() -> None:
            log.info("ready", extra={"url": url_of(listener), "seconds": round(time.monotonic() - started, 1)})
            if settings.log_format == "text":
                state = server.state
                introduce(state.base.id, state.store, state.task, url_of(listener), with_keys=bool(state.keys))

        reload_on_sighup(settings.api_key_file, server.state.keys)
        if hangups:
            signal.raise_signal(signal.SIGHUP)
        try:
            serve(server, listener, drain_timeout_s=settings.drain_timeout_s, announce=announce)
        finally:
            server.close()
    log.info("stopped")
    return 0


def _run_replicas(settings: Settings, listener: socket.socket, hangups: list[int]) -> None:
    try:
        from service.cluster.local import Replicated
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise CommandError(
            "--replicas needs Ray, which is not installed: pip install 'vblora-serve[ray]', or leave it out"
        ) from error
    started = time.monotonic()
    with Replicated(settings) as replicated:

        def announce() -> None:
            seconds = round(time.monotonic() - started, 1)
            log.info("ready", extra={"url": url_of(listener), "replicas": settings.replicas, "seconds": seconds})
            if settings.log_format == "text":
                with_keys = bool(replicated.keys)
                introduce(replicated.base, replicated.store, Task(settings.task), url_of(listener), with_keys=with_keys)

        reload_on_sighup(settings.api_key_file, replicated.keys)
        if hangups:
            signal.raise_signal(signal.SIGHUP)
        serve_app(
            replicated.ingress,
            replicated.ingress.work,
            listener,
            drain_timeout_s=settings.drain_timeout_s,
            request_timeout_s=settings.request_timeout_s,
            announce=announce,
        )


def end_on_sigterm() -> None:
    """SIGTERM ends the process also while the model loads; a container's first process would ignore it by default."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))


def remember_sighup() -> list[int]:
    """SIGHUP, which by default ends a process, is only noted while the model loads."""
    hangups: list[int] = []
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, lambda number, frame: hangups.append(number))
    return hangups


def reload_on_sighup(path: Path | None, keys: KeyRing) -> None:
    """SIGHUP has the API key file read anew. One that cannot be used changes nothing; what runs goes on."""

    def reload(number: int, frame: FrameType | None) -> None:
        if path is None:
            log.info("SIGHUP: there is no API key file to read anew")
            return
        try:
            read = load_key_file(path)
        except KeyFileError as error:
            log.error("SIGHUP: the API keys stay as they are: %s", error)
            return
        keys.replace(read)
        log.info("SIGHUP: read the API keys anew", extra={"keys": len(read)})

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, reload)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to the address, before minutes go into loading a model. Raises SettingsError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"host is {host!r}, which is no address of this machine: {error.strerror}") from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            reason = f"{error.strerror}; choose another --host or --port"
            raise SettingsError(f"cannot listen on {host} port {port}: {reason}") from error
        yield listener


def serve(
    server: Server, listener: socket.socket, *, drain_timeout_s: float, announce: Callable[[], None] = lambda: None
) -> None:
    """Answers requests until a signal asks to end, then until those running have ended.

    `announce` is called once the server accepts connections.
    """
    serve_app(
        create_app(server.state),
        server.engine,
        listener,
        drain_timeout_s=drain_timeout_s,
        request_timeout_s=server.state.settings.request_timeout_s,
        announce=announce,
    )


def serve_app(
    app: ASGIApp,
    work: Ending,
    listener: socket.socket,
    *,
    drain_timeout_s: float,
    request_timeout_s: float | None,
    announce: Callable[[], None],
) -> None:
    """The same for any application, whose work can be ended."""
    if request_timeout_s is not None:
        give_up_on_stalled_clients(listener, request_timeout_s)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # the application writes its own
        server_header=False,
        ws="none",
        lifespan="off",
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(drain_timeout_s + _LAST_WORDS_S),
    )
    DrainingServer(config, work, drain_timeout_s, announce).run([listener])


def give_up_on_stalled_clients(listener: socket.socket, seconds: float) -> None:
    """Has the system close every connection whose client takes nothing of what is sent to it for so long.

    Else it would be held for ever, with an answer that was complete long ago. Linux alone can.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        listener.setsockopt(socket.IPPROTO_TCP, option, math.ceil(1000 * min(seconds, _LONGEST_STALL_S)))


class Ending(Protocol):
    """Work that can be brought to its end: an engine, or what an ingress passes on."""

    def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits for the rest; False when some of it still ran."""
        ...

    def stop(self) -> None:
        """Has what still runs fail."""
        ...


class DrainingServer(uvicorn.Server):
    """Ends in order: no new connections and requests; those running may finish; the rest are told that they fail."""

    def __init__(
        self, config: uvicorn.Config, work: Ending, drain_timeout_s: float, announce: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._work = work
        self._drain_timeout_s = drain_timeout_s
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks to end, the second to hurry. Unlike uvicorn's, it is not raised again at the end."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("ending: requests have %g seconds to finish", self._drain_timeout_s)
        draining = asyncio.create_task(asyncio.to_thread(self._drain))
        await super().shutdown(sockets)
        await asyncio.to_thread(self._work.stop)  # in a hurry, requests may still run
        await draining

    def _drain(self) -> None:
        if not self._work.drain(self._drain_timeout_s):
            log.warning("some requests did not end within %g seconds: failing them", self._drain_timeout_s)
            self._work.stop()


def url_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


_EXAMPLES: Mapping[Task, tuple[str, Mapping[str, object]]] = {
    Task.GENERATE: ("/v1/generate", {"prompt": "Once upon a time", "max_new_tokens": 32}),
    Task.SEQ2SEQ: ("/v1/generate", {"prompt": "summarize: It rained. It rained all day.", "max_new_tokens": 32}),
    Task.CLASSIFY: ("/v1/classify", {"input": "What a lovely day!"}),
    Task.EMBED: ("/v1/embeddings", {"input": "What a lovely day!"}),
}


def introduce(base: str, store: Store, task: Task, url: str, *, with_keys: bool) -> None:
    """Says where the server is, and how to try it."""
    records, _ = store.list("", limit=1)
    route, body = _EXAMPLES[task]
    body = dict(body)
    if records:
        body["adapter"] = records[0].name
    key = " -H 'Authorization: Bearer YOUR-KEY'" if with_keys else ""
    say(f"Serving {base} with {store.count('')} adapters at {url}. Try:")
    say(f"  curl {url}{route}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'")
