"""Whether the server lives, whether it takes requests, what it counts, and of what it is made."""

from __future__ import annotations

import platform
from importlib.metadata import version

from fastapi import APIRouter, Request, Response

from service import __version__
from service.api.deps import State
from service.api.errors import ApiError
from service.api.keys import key_of
from service.api.schemas.common import error_responses
from service.api.schemas.health import Status, Versions
from service.engine.seam import EngineState

router = APIRouter(tags=["health"])

_NOT_READY = {
    EngineState.DRAINING: "the server is draining: it finishes what it has and takes nothing new",
    EngineState.STOPPED: "the server is stopping",
    EngineState.DEAD: "the engine's thread has died: restart the server; its log says why",
}


@router.head("/healthz", include_in_schema=False)  # some probes ask so
@router.get("/healthz", responses=error_responses(503))
async def health(state: State) -> Status:
    """200 as long as the process can serve; 503 once its engine has died, which only a restart mends."""
    if state.engine.state is EngineState.DEAD:
        raise ApiError("engine_unavailable", _NOT_READY[EngineState.DEAD])
    return Status(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses=error_responses(503))
async def readiness(state: State) -> Status:
    """200 while the server takes requests, 503 and the reason while it does not."""
    if state.engine.state is not EngineState.READY:
        raise ApiError("engine_unavailable", _NOT_READY[state.engine.state])
    return Status(status="ready")


@router.get("/metrics", responses=error_responses(401), response_class=Response)
def metrics(request: Request, state: State) -> Response:
    """Prometheus' text format. What tells of tenants is for keys: of a tenant's own use, or of the shared tenant's."""
    key = key_of(request.scope)
    content, content_type = state.metrics.render(None if key is None else key.tenant)
    return Response(content, media_type=content_type)


@router.get("/version", responses=error_responses(401))
async def versions(state: State) -> Versions:
    """What runs: this server, the libraries under it, the base model and how it is run."""
    base = state.base
    return Versions(
        version=__version__,
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        model=state.settings.served_model_name,
        model_type=base.model_type,
        fingerprint=base.fingerprint,
        dtype=base.dtype,
        quantization=base.quantization,
        weight_bytes=base.weight_bytes,
        device=base.device,
        kv_backend=base.kv_backend,
        task=state.task,
    )
