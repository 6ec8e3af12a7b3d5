"""The server as a Ray Serve application: `serve run service.ray_app:build_app model=…`, or deploy/ray/serve.yaml.

Two deployments. An `EngineReplica` holds a whole server; as many run as the configuration or the autoscaler says. The
`Ingress` guards them and finds the replica that a request belongs to. `args` are settings by their names, as in a
`--config` file; variables (VBLORA_…) count as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, TextIO

from ray import serve
from ray.serve import Application
from ray.serve._private import replica
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.keys import KeyRing
from service.api.stats import show_stats
from service.assembly import build_server, load_keys, open_store
from service.cluster.ingress import Ingress as IngressApp
from service.cluster.key_file import KeyFile
from service.cluster.log_lines import LineSender
from service.cluster.messages import Facts, Forwarded, Message
from service.cluster.metrics import IngressMetrics
from service.cluster.replica import Replica
from service.cluster.replicas import RayReplicas
from service.engine.seam import EngineState
from service.logs import quiet_libraries, setup_logging
from service.settings import Settings, SettingsError, load_settings

ROUTER = "service.cluster.router:AffinityRouter"
RESERVE = 32  # requests at once that take no place in an engine
ASKED_S = 4.0
LAST_WORDS_S = 10.0  # after the drain
_MOST_AT_INGRESS = 10_000


class Engine:
    """A replica: a whole server, asked in process."""

    def __init__(self, settings: Settings, log_lines: str | None = None) -> None:
        """`log_lines`: Ray is a process's own on this machine, and takes log lines there."""
        quiet_libraries()
        _log(settings, None if log_lines is None else LineSender(log_lines))
        if log_lines is not None:
            _stay_on_loopback()
        self._settings = settings
        self._server = build_server(settings)
        self._replica = Replica(self._server.state, _load)

    async def answer(self, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        generator = self._replica.answer(request)
        try:
            async for batch in generator:
                yield batch
        finally:
            await generator.aclose()

    async def facts(self) -> Facts:
        state = self._server.state
        return Facts(state.settings, state.base.id)

    async def ask(self, question: str, *arguments: Any) -> tuple[str, Any]:
        """(what this replica is called in metrics, the answer)."""
        answers = {"metrics": self._metrics, "stats": self._stats}
        name = str(serve.get_replica_context().rank.rank)
        answer = asyncio.to_thread(answers[question], *arguments)
        return name, await asyncio.wait_for(answer, ASKED_S)  # one that is stuck must not keep the others' answers back

    def _metrics(self, reader: str | None) -> str:
        return self._server.state.metrics.render(reader)[0].decode()

    def _stats(self, tenant: str) -> Any:
        return show_stats(self._server.state, tenant)

    def check_health(self) -> None:
        """Ray asks again and again; a replica that fails is replaced."""
        if self._server.engine.state is EngineState.DEAD:
            raise RuntimeError("the engine's thread has died; the replica's log says why")

    async def __del__(self) -> None:
        """Ray calls it when no request is left, or when they have had their time."""
        if (server := getattr(self, "_server", None)) is not None:
            await asyncio.to_thread(server.engine.drain, self._settings.drain_timeout_s)
            await asyncio.to_thread(server.close)


class Front:
    """An ingress behind Ray's HTTP proxy."""

    def __init__(self, settings: Settings, engines: DeploymentHandle) -> None:
        _log(settings)
        self._settings = settings
        self._replicas = RayReplicas(engines)
        self._keys = KeyRing(load_keys(settings.api_key_file) if settings.api_key_file else ())
        self._key_file = KeyFile(settings.api_key_file, self._keys) if settings.api_key_file else None
        self._app: IngressApp | None = None
        self._building = asyncio.Lock()

    async def __call__(self, request: Request) -> Response:
        if self._key_file is not None:
            self._key_file.look()
        return _Answer(await self._built())

    async def _built(self) -> IngressApp:
        async with self._building:
            if self._app is None:
                facts = await self._replicas.facts()
                store = await asyncio.to_thread(open_store, self._settings, reserved=facts.settings.base_names)
                self._app = IngressApp(self._replicas, store, self._keys, facts.settings, IngressMetrics())
        return self._app


class _Answer(Response):
    """Ray has what a deployment returns answer by ASGI."""

    def __init__(self, app: IngressApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def engine_options(settings: Settings) -> dict[str, Any]:
    """How Ray is to run replicas: a request that all are too busy for is refused, those under way may end."""
    return {
        "name": "EngineReplica",
        "max_ongoing_requests": settings.max_batch_size + settings.max_queue + RESERVE,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": settings.drain_timeout_s + LAST_WORDS_S,
        "health_check_period_s": 5.0,
        "request_router_config": RequestRouterConfig(
            request_router_class=ROUTER,
            request_router_kwargs={"reserve": RESERVE, "places": settings.max_batch_size},
        ),
    }


def engines(settings: Settings, *, log_lines: str | None = None, **options: Any) -> Application:
    """The replicas alone, for an ingress elsewhere."""
    return serve.deployment(Engine).options(**{**engine_options(settings), **options}).bind(settings, log_lines)


def build_app(args: Mapping[str, Any]) -> Application:
    """The application of the settings in `args`. Raises SettingsError."""
    settings = load_settings(_flags(args))
    if settings.model is None or settings.store is None:
        raise SettingsError("an application needs a model and a store that its replicas share: give both in args")
    front = serve.deployment(Front).options(name="Ingress", max_ongoing_requests=_MOST_AT_INGRESS)
    application: Application = front.bind(settings, engines(settings))
    return application


def _flags(args: Mapping[str, Any]) -> dict[str, Any]:
    """As flags would give them: texts, or several of them."""
    return {name: value if isinstance(value, list) else str(value) for name, value in args.items()}


def _log(settings: Settings, stream: TextIO | None = None) -> None:
    setup_logging(format=settings.log_format, level=settings.log_level, prompts=settings.log_prompts, stream=stream)


def _stay_on_loopback() -> None:
    """Ray has replicas listen for other deployments, on every address: here there are none."""
    listen = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: listen(server, "127.0.0.1:0")


async def _load(piece: Any) -> bytes:
    """A piece of a body: itself, or a reference to where the ingress put it."""
    return piece if isinstance(piece, bytes) else await piece
