"""What the ingress answers itself: whether it lives and is ready, and what is to be known of all replicas together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from adapters.store import SHARED
from service.api.deps import ApiSettings
from service.api.errors import ApiError, ErrorResponse
from service.api.keys import key_of
from service.api.schemas.stats import StatsView
from service.cluster.metrics import IngressMetrics, merged
from service.cluster.seam import Replicas
from service.cluster.stats import together
from service.cluster.work import Work

_PROBED = frozenset({"/healthz", "/readyz"})

Answer = Callable[[Scope], Awaitable[Response]]


class OwnAnswers:
    """The routes that are about the whole, by method and path."""

    def __init__(self, replicas: Replicas, metrics: IngressMetrics, settings: ApiSettings, work: Work) -> None:
        self._replicas = replicas
        self._metrics = metrics
        self._settings = settings
        self._work = work
        self._routes: dict[str, Answer] = {
            "/healthz": self._health,
            "/readyz": self._readiness,
            "/metrics": self._all_metrics,
            "/v1/stats": self._stats,
        }

    def route(self, method: str, path: str) -> Answer | None:
        return self._routes.get(path) if method == "GET" or (method == "HEAD" and path in _PROBED) else None

    async def _health(self, scope: Scope) -> Response:
        """200 as long as this process can serve: replicas that die are replaced."""
        return JSONResponse({"status": "ok"})

    async def _readiness(self, scope: Scope) -> Response:
        if self._work.draining:
            message = "the server is draining: it finishes what it has and takes nothing new"
        elif self._replicas.count() == 0:
            message = "no replica is ready: they load the model, or have died and are being replaced"
        else:
            return JSONResponse({"status": "ready"})
        return ErrorResponse(ApiError("engine_unavailable", message))

    async def _all_metrics(self, scope: Scope) -> Response:
        key = key_of(scope)
        reader = None if key is None else key.tenant
        texts = await self._replicas.ask_all("metrics", reader)
        own, content_type = self._metrics.render(self._replicas.count())
        return Response(merged(own if reader in (None, SHARED) else "", texts), media_type=content_type)

    async def _stats(self, scope: Scope) -> Response:
        key = key_of(scope)
        views = await self._replicas.ask_all("stats", SHARED if key is None else key.tenant)
        if not views:
            return ErrorResponse(ApiError("engine_unavailable", "no replica is ready"))
        view: StatsView = together(list(views.values()))
        return JSONResponse(view.model_dump(mode="json"))
