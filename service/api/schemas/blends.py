"""POST /v1/blends: adapters and weights, to become one adapter."""

from __future__ import annotations

from pydantic import Field

from service.api.schemas.common import RequestModel, Text
from service.api.schemas.generate import BlendPart


class BlendRequest(RequestModel):
    name: Text = Field(description="What the new adapter is called")
    adapters: list[BlendPart] = Field(description="What it is the weighted sum of; weights may be negative")
    replace: bool = Field(False, description="Make a new version if the name exists")
