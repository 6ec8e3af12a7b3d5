"""Tools: which of them a model may or must call, and how its output is then shaped and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from service.api.errors import ApiError
from service.api.schemas.chat import ChatRequest, FunctionSpec, NamedTool
from service.api.tool_calls import Arguments, CallArray, OutputReader, PlainText, TaggedCalls

_ANY_ARGUMENTS: Mapping[str, Any] = {"type": "object"}
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_DEFINITIONS = ("$defs", "definitions")  # the keyword of JSON Schema, and what it was called before 2019
_TAG = "<tool_call>"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request's tools mean for its output.

    `schema` is the JSON that it must be, None if it is free; `reader` makes what reads one choice of it; `shown` says
    whether the template is given the tools.
    """

    reader: Callable[[], OutputReader] = PlainText
    schema: dict[str, Any] | None = None
    shown: bool = False


def tool_use(body: ChatRequest, template: str | None) -> ToolUse:
    """What `tools` and `tool_choice` ask for, given the chat template that will show them. Raises ApiError.

    A forced call follows the tools' schemas by construction, whatever the model. Whether to call one at all can be left
    to models whose templates ask for the one way of writing calls that is understood here.
    """
    if not body.tools or body.tool_choice == "none":
        return ToolUse()
    functions = [tool.function for tool in body.tools]
    if len({function.name for function in functions}) < len(functions):
        raise ApiError("invalid_request", "two tools have the same name: rename one", param="tools")
    if isinstance(body.tool_choice, NamedTool):
        return _named(functions, body.tool_choice.function.name)
    if body.tool_choice == "required":
        schema = _calls_schema(functions, parallel=body.parallel_tool_calls is not False)
        return ToolUse(CallArray, schema, shown=True)
    if template is None or _TAG not in template:
        raise ApiError(
            "invalid_request",
            f"tool_choice 'auto' needs a chat template that has calls written in {_TAG} tags, and this model's does "
            "not: ask for 'required', name one function, or 'none'",
            param="tool_choice",
        )
    most = 1 if body.parallel_tool_calls is False else None
    return ToolUse(partial(TaggedCalls, most), shown=True)


def _named(functions: Sequence[FunctionSpec], name: str) -> ToolUse:
    for function in functions:
        if function.name == name:
            return ToolUse(partial(Arguments, name), dict(_parameters(function)), shown=True)
    raise ApiError(
        "invalid_request", f"tool_choice names {name[:80]!r}, which is not among the tools", param="tool_choice"
    )


def _parameters(function: FunctionSpec) -> Mapping[str, Any]:
    return _NO_ARGUMENTS if function.parameters is None else function.parameters or _ANY_ARGUMENTS


def _calls_schema(functions: Sequence[FunctionSpec], *, parallel: bool) -> dict[str, Any]:
    """An array of {"name", "parameters"}. Definitions that parameters refer to move to where they are looked for."""
    definitions: dict[str, dict[str, Any]] = {}  # by keyword
    calls = []
    for function in functions:
        parameters = dict(_parameters(function))
        for keyword in (keyword for keyword in _DEFINITIONS if keyword in parameters):
            _add_definitions(definitions.setdefault(keyword, {}), keyword, parameters.pop(keyword))
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return schema | definitions


def _add_definitions(known: dict[str, Any], keyword: str, added: Any) -> None:
    if not isinstance(added, dict):
        raise ApiError("invalid_request", f"{keyword} of a tool's parameters must be an object", param="tools")
    for name, definition in added.items():
        if known.setdefault(name, definition) != definition:
            message = f"two tools define {name!r} in {keyword}, differently: rename one"
            raise ApiError("invalid_request", message, param="tools")
