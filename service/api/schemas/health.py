"""Status and versions."""

from __future__ import annotations

from pydantic import Field

from service.api.schemas.common import ResponseModel


class Status(ResponseModel):
    status: str


class Versions(ResponseModel):
    """`fingerprint` identifies the base model's weights; `kv_backend` is null where the engine has no choice.

    `quantization` says how its weights are stored, null for plainly in `dtype`; `weight_bytes` what they take.
    """

    version: str
    python: str
    torch: str
    transformers: str
    model: str
    model_type: str
    fingerprint: str
    dtype: str
    quantization: str | None
    weight_bytes: int
    device: str
    kv_backend: str | None
    task: str = Field(description="`generate`, `seq2seq`, `classify` or `embed`")
