"""Which grammar, if any, a request's output has to follow: `response_format`, or one of vLLM's `guided_…` fields."""

from __future__ import annotations

import json
from typing import Any

from service.api.deps import ServerState
from service.api.errors import ApiError
from service.api.schemas.openai import JsonObjectFormat, JsonSchemaFormat, JsonSchemaResponseFormat, OpenAIFields
from service.engine.guide import Grammar


def grammar_of(state: ServerState, body: OpenAIFields) -> Grammar | None:
    """Compiles. Raises ApiError for what cannot be, and when the server lacks the library for it."""
    match body.response_format:
        case JsonObjectFormat() | JsonSchemaResponseFormat(json_schema=JsonSchemaFormat(json_schema=None)):
            return state.guidance.json_object()
        case JsonSchemaResponseFormat(json_schema=JsonSchemaFormat(json_schema=dict() as schema)):
            return state.guidance.json_schema(schema)
    if body.guided_json is not None:
        return state.guidance.json_schema(_schema(body.guided_json), param="guided_json")
    if body.guided_regex is not None:
        return state.guidance.regex(body.guided_regex)
    if body.guided_choice is not None:
        return state.guidance.choice(body.guided_choice)
    return None


def _schema(given: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        schema = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ApiError("invalid_request", f"guided_json is not JSON: {error}", param="guided_json") from error
    if not isinstance(schema, dict):
        raise ApiError("invalid_request", "guided_json must be a JSON schema, which is an object", param="guided_json")
    return schema
