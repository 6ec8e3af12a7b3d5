"""What the routes share that read texts once: their inputs, and their selection."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from service.api.schemas.common import RequestModel, Text, check_text
from service.api.schemas.generate import SelectionFields

MAX_INPUTS = 2048


class TextPair(RequestModel):
    """One input of two texts, as transformers' pipelines write it."""

    text: Text
    text_pair: Text | None = None


Item = str | TextPair | list[int]
_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Described = str | TextPair | _TokenIds


def _input_of(value: Any) -> Any:
    if isinstance(value, str):
        return check_text(value)
    if isinstance(value, dict | BaseModel) or _is_ids(value):
        return value
    raise ValueError(
        'each input is a string, a list of token ids (whole numbers of at least 0), or {"text": …, "text_pair": …} for '
        "a pair of texts"
    )


def _inputs(value: Any) -> Any:
    """One input or several, as a list. Two strings in a list are two inputs."""
    if not isinstance(value, list) or (value and _is_ids(value)):
        return [_input_of(value)]
    if not 1 <= len(value) <= MAX_INPUTS:
        raise ValueError(f"give 1 to {MAX_INPUTS:,} inputs, not {len(value):,}")
    return [_input_of(each) for each in value]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


_DescribedList = Annotated[list[_Described], Field(min_length=1, max_length=MAX_INPUTS)]
Inputs = Annotated[list[Item], BeforeValidator(_inputs, json_schema_input_type=_Described | _DescribedList)]


class PooledFields(SelectionFields):
    """`model` selects as in /v1/completions."""

    model: Text | None = Field(
        None, description="The base's id, an adapter's name, `name@sha256:<prefix>`, or a blend: `sql:0.7+style:0.3`"
    )
    input: Inputs = Field(description="A text, a pair of texts, token ids, or a list of these; each is read on its own")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="Keeps so many of each input's first tokens, special ones included; -1: the context's"
    )
    timeout_s: float | None = Field(None, gt=0, description="The server's own limit counts if it is lower")
    user: Any = Field(None, description="Accepted, and of no effect")
