"""Adapters as requests name them and as responses describe them: one shape everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from adapters.status import AdapterState, AdapterStatus
from adapters.store import SHARED, Activation, AdapterRecord
from service.api.schemas.common import QueryModel, RequestModel, ResponseModel, Text
from service.engine.selection import Mode


def _activate(value: Any) -> Any:
    if isinstance(value, bool) or value in ("switch", "merge"):
        return value
    raise ValueError("give true, false, 'switch' or 'merge'")


class SourceUpload(RequestModel):
    """An adapter that the server fetches itself: from its own disk, or from the Hub."""

    name: Text
    source: Text = Field(
        description="An absolute directory, hf://org/repo[@revision] or s3://bucket/prefix, that --allow-source allows"
    )
    activate: Annotated[bool | Literal["switch", "merge"], BeforeValidator(_activate)] = False

    @property
    def activation(self) -> Mode | None:
        if isinstance(self.activate, bool):
            return Mode.SWITCH if self.activate else None
        return Mode(self.activate)


class UploadQuery(QueryModel):
    replace: bool = Field(False, description="Make a new version if the name exists")
    allow_base_mismatch: bool = Field(False, description="Take an adapter whose config names another base model")


class PageQuery(QueryModel):
    limit: int = Field(100, ge=1, le=1000)
    after: str | None = Field(None, description="The `next` of the page before")


class ActivateRequest(RequestModel):
    mode: Literal["switch", "merge"] = "switch"


class RollbackRequest(RequestModel):
    digest: Text = Field(description="`sha256:` and at least 8 hex digits of an earlier version's digest")


class AdapterView(ResponseModel):
    """One adapter, its current version spelled out.

    Times are Unix times in seconds. `storage` is `topk`, `logits` or `lora`; of a plain LoRA adapter, what is VB-LoRA's
    is null. `mode` is null unless the adapter is active; `reason` unless it is FAILED.
    """

    name: str
    digest: str
    base: str = Field(description="The base model that it runs on")
    created_at: float
    updated_at: float
    state: AdapterState
    reason: str | None
    shared: bool = Field(description="Whether every tenant sees it; such a one is not a tenant's to change")
    active: bool
    mode: str | None
    file_bytes: int
    resident_bytes: int
    pins: int
    last_used: float | None
    requests: int = Field(
        description="Accepted with it, alone or in a blend, since the server's start; of other tenants none"
    )
    r: int
    num_vectors: int | None
    vector_length: int | None
    topk: int | None
    storage: str
    vblora_params: int | None
    total_params: int
    lora_params: int = Field(description="Plain LoRA's, of the same rank on the same layers")
    resumable: bool = Field(description="Whether training can go on from these files")
    warnings: list[str]
    target_modules: int | list[str] = Field(description="How many layers are adapted; in a single GET, which")


class MergedView(AdapterView):
    """An adapter just activated with `merge`.

    `merge_error` is ‖fold(W) − W − Δ‖ / ‖Δ‖ of the worst layer; null if the batch has not allowed a fold yet.
    """

    merge_error: float | None
    merge_error_layer: str | None


class VersionView(ResponseModel):
    digest: str
    created_at: float
    file_bytes: int
    current: bool
    state: AdapterState


class BlendedPart(ResponseModel):
    name: str
    digest: str
    weight: float


class AdapterDetail(AdapterView):
    config: dict[str, Any]
    blend: list[BlendedPart] | None = Field(description="What it is the weighted sum of, if it was blended here")
    versions: list[VersionView] = Field(description="Newest first")


class AdapterPage(ResponseModel):
    data: list[AdapterView]
    next: str | None = Field(description="Ask for the next page with ?after=; null on the last one")


_COUNTS = ("r", "num_vectors", "vector_length", "topk", "storage", "vblora_params", "total_params", "lora_params")


def adapter_fields(
    record: AdapterRecord, status: AdapterStatus, active: Activation | None, base: str, requests: int
) -> dict[str, Any]:
    """The fields of an AdapterView."""
    parameters: Mapping[str, Any] = record.info["parameters"]
    is_active = active is not None and (active.owner, active.name) == (record.tenant, record.name)
    return {
        "name": record.name,
        "digest": record.digest,
        "base": base,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "state": status.state,
        "reason": status.reason,
        "shared": record.tenant == SHARED,
        "active": is_active,
        "mode": active.mode if active is not None and is_active else None,
        "file_bytes": record.file_bytes,
        "resident_bytes": status.resident_bytes,
        "pins": status.pins,
        "last_used": status.last_used,
        "requests": requests,
        "resumable": record.info["resumable"],
        "warnings": record.info["warnings"],
        "target_modules": len(record.info["target_modules"]),
        **{key: parameters[key] for key in _COUNTS},
    }
