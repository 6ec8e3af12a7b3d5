"""pydantic's validation errors, said in a sentence that names the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

_MOST_SHOWN = 5
_LONGEST_NAME = 80
_WORDS = {" after validation": "", "a valid dictionary or object to extract fields from": "an object"}  # theirs: ours
_FORMATS = frozenset({"text", "json_object", "json_schema"})  # of a response_format: pydantic has them in its paths
_NOT_AN_OBJECT = frozenset({"model_attributes_type", "model_type", "dict_type", "missing"})

ErrorDetails = Mapping[str, Any]


def describe_validation_error(errors: Sequence[ErrorDetails]) -> tuple[str, str | None]:
    """(message, the field it is about). Unknown fields come first: a misspelt one explains one that is missing."""
    first = errors[0]
    if first["type"] == "json_invalid":
        where = f" at character {first['loc'][-1]}" if isinstance(first["loc"][-1], int) else ""
        return f"the body is not valid JSON: {first['ctx']['error']}{where}", None
    if tuple(first["loc"]) == ("body",) and first["type"] in _NOT_AN_OBJECT:
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    if unknown := [_field(error) for error in errors if error["type"] == "extra_forbidden"]:
        return _unknown_fields(first["loc"][0], unknown), unknown[0]
    return "; ".join(_sentence(error) for error in errors[:_MOST_SHOWN]), _field(first) or None


def _unknown_fields(where: str, names: Sequence[str]) -> str:
    what = "query parameter" if where == "query" else "field"
    shown = ", ".join(repr(name) for name in names[:_MOST_SHOWN])
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    plural = "s" if len(names) > 1 else ""
    return f"unknown {what}{plural} {shown}{more}: remove or correct it; /docs lists what this route takes"


def _sentence(error: ErrorDetails) -> str:
    if error["type"] == "missing":
        return f"{_field(error)!r} is missing: give it"
    message = str(error["msg"]).removeprefix("Value error, ")
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return f"{_field(error)!r}: {message[:1].lower()}{message[1:]}"


def _field(error: ErrorDetails) -> str:
    """`adapters[0].weight` for ("body", "adapters", 0, "weight")."""
    path = ""
    for before, part in pairwise(error["loc"]):
        if before == "response_format" and part in _FORMATS:
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part[:_LONGEST_NAME]}"
    return path.removeprefix(".")
