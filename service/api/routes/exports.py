"""GET /v1/adapters/{name}/export: an adapter as a directory that PEFT loads."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from service.api.deps import State, Tenant
from service.api.exports import ExportFormat, pack, size_of, stream
from service.api.schemas.common import QueryModel, error_responses

router = APIRouter(tags=["adapters"])

_TAR: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A tar archive of a PEFT directory",
        "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class ExportQuery(QueryModel):
    format: ExportFormat = "topk"


@router.get(
    "/v1/adapters/{name}/export",
    response_class=StreamingResponse,
    responses=_TAR | error_responses(400, 401, 404, 422, 503, 507),
)
async def export_adapter(
    name: str, query: Annotated[ExportQuery, Query()], state: State, tenant: Tenant
) -> StreamingResponse:
    """The adapter's current version: compact (`topk`), with full logits or as plain LoRA, with its chat template."""
    record = await to_thread.run_sync(state.store.visible, tenant, name)
    file = await to_thread.run_sync(pack, state, record, query.format, limiter=state.registering)
    headers = {
        "Content-Disposition": f'attachment; filename="{record.name}-{query.format}.tar"',
        "Content-Length": str(size_of(file)),
        "X-Adapter-Digest": record.digest,
    }
    return StreamingResponse(stream(file), media_type="application/x-tar", headers=headers)
