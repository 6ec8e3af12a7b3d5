"""The bodies of vLLM's two routes."""

from __future__ import annotations

from pydantic import Field

from service.api.schemas.common import RequestModel, Text


class LoadLoraRequest(RequestModel):
    lora_name: Text
    lora_path: Text = Field(
        description="An absolute directory, or hf://org/repo[@revision] or org/repo, that --allow-source allows"
    )
    load_inplace: bool = Field(False, description="Make a new version if the name exists with other files")


class UnloadLoraRequest(RequestModel):
    lora_name: Text
    lora_int_id: int | None = Field(None, description="Accepted, and not needed: names are unique")
