"""The web application: routes, middleware and error handlers around one ServerState."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.middleware import Middleware

from service import __version__
from service.api.deps import ApiSettings, RequestMetrics, ServerState
from service.api.errors import install_error_handlers
from service.api.keys import KeyRing
from service.api.middleware.auth import Authentication
from service.api.middleware.body import BodyLimits
from service.api.middleware.context import RequestContext
from service.api.middleware.cors import CrossOrigin
from service.api.middleware.pages import ForeignPages
from service.api.middleware.uncaught import UncaughtErrors
from service.api.routes import (
    activation,
    adapters,
    bank,
    blends,
    chat,
    classify,
    completions,
    docs,
    embeddings,
    exports,
    generate,
    health,
    lora,
    lorax,
    models,
    parameters,
    stats,
    tokenize,
)

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_API_ROUTERS = (
    generate.router,
    completions.router,
    chat.router,
    lorax.router,
    classify.router,
    embeddings.router,
    models.router,
    adapters.router,
    activation.router,
    blends.router,
    exports.router,
    parameters.router,
    bank.router,
    lora.router,
    tokenize.router,
    stats.router,
)

# Only for the OpenAPI page's "Authorize": keys are checked by middleware, before a body is read.
_DOCUMENTED_KEY = Depends(HTTPBearer(auto_error=False, description="An API key, if the server asks for one"))


def create_app(state: ServerState, *, lifespan: Lifespan | None = None) -> FastAPI:
    """The app over what is already built and running; `lifespan` may start and stop it with the server."""
    app = create_routes(state, lifespan=lifespan)
    # Added innermost first.
    for layer in guards(state.settings, state.keys, state.metrics):
        app.add_middleware(layer.cls, *layer.args, **layer.kwargs)
    return app


def create_routes(state: ServerState, *, lifespan: Lifespan | None = None) -> FastAPI:
    """The routes alone. Whoever calls them has done what the guards do, and left `request_id` and `key` in the state
    of the scope.
    """
    app = FastAPI(
        title="vblora-serve",
        summary="Serve many VB-LoRA adapters from one base model: switch, blend and merge them per request.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    app.state.server = state
    install_error_handlers(app)
    for router in _API_ROUTERS:
        app.include_router(router, dependencies=[_DOCUMENTED_KEY])
    app.include_router(health.router)
    app.include_router(docs.router)
    return app


def guards(settings: ApiSettings, keys: KeyRing, metrics: RequestMetrics) -> list[Middleware]:
    """What stands before the routes, the innermost first."""
    layers = [
        Middleware(BodyLimits, settings=settings),
        Middleware(Authentication, keys=keys, metrics_public=settings.metrics_public),
        Middleware(ForeignPages, keys=keys, origins=settings.cors_origins),
        Middleware(UncaughtErrors),
    ]
    if settings.cors_origins:
        layers.append(Middleware(CrossOrigin, origins=settings.cors_origins))
    return [*layers, Middleware(RequestContext, metrics=metrics)]


def _operation_id(route: APIRoute) -> str:
    return route.name
