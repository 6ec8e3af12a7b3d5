"""What all request and response models share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict


class RequestModel(BaseModel):
    """A JSON body: unknown fields are an error, and no type is converted to another."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class QueryModel(BaseModel):
    """Query parameters: unknown ones are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ResponseModel(BaseModel):
    model_config = ConfigDict(frozen=True)


def check_text(text: str) -> str:
    """The text, if it can be written as UTF-8. Raises ValueError for one that JSON's \\ud800 alone has got into."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character; send valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(check_text)]


class ErrorBody(ResponseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(ResponseModel):
    """Every error of every route. `message` says what is wrong and what to do."""

    error: ErrorBody


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documents the errors of a route, by status."""
    documented: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorEnvelope, "description": _CODES_BY_STATUS[status]} for status in statuses
    }
    return {**documented, "default": {"model": ErrorEnvelope, "description": "Any other error: `internal_error`"}}


# One server-sent event, described as OpenAPI 3.2 does: before, there was no word for what a stream is made of.
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "contentMediaType": "application/json"}},
}


def streaming_responses(
    described: str = "The choices; with `stream`, events, and `data: [DONE]` in the end",
) -> dict[int | str, dict[str, Any]]:
    """Documents what a route answers that generates."""
    documented = error_responses(400, 401, 404, 408, 413, 429, 503)
    documented[200] = {"description": described, "content": {"text/event-stream": {"itemSchema": _EVENT}}}
    return documented


_CODES_BY_STATUS = {
    400: "`invalid_request`, `context_length_exceeded`, `wrong_task`",
    401: "`unauthorized`",
    403: "`forbidden`",
    404: "`adapter_not_found`, `model_not_found`",
    408: "`request_timeout`",
    409: "`adapter_exists`",
    413: "`payload_too_large`",
    415: "`unsupported_checkpoint`",
    422: "A checkpoint refused: `invalid_safetensors`, `bad_config`, `missing_tensor`, `unexpected_tensor`, "
    "`shape_mismatch`, `bad_index`, `bad_weights`, `non_finite`, `no_target_matched`, `base_model_mismatch`",
    429: "`overloaded`; Retry-After says when to come back",
    503: "`adapter_unavailable`, `engine_unavailable`, `store_unavailable`",
    507: "`storage_full`",
}
