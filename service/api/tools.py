"""Tools: which of them a model may call, what its output must then look like, and the calls that are in it.

A call is forced, by `tool_choice` "required" or by a tool's name, and follows the tools' schemas by construction.
Whether to call one at all cannot be left to the model: how it would say so differs from model to model.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.api.errors import ApiError
from service.api.schemas.chat import ChatRequest, FunctionCallView, FunctionSpec, NamedTool, ToolCallView

_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ForcedCall:
    """`schema` is the output's. With a `name` the output is that tool's arguments; without, an array of calls."""

    schema: dict[str, Any]
    name: str | None = None

    def calls(self, text: str) -> list[ToolCallView] | None:
        """The calls in a whole output; None for one that was cut off."""
        if self.name is not None:
            return [_call(0, self.name, text)]
        try:
            written = json.loads(text)
        except ValueError:
            return None
        arguments = [json.dumps(call["parameters"], ensure_ascii=False) for call in written]
        return [_call(i, call["name"], arguments[i]) for i, call in enumerate(written)]


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _call(index: int, name: str, arguments: str) -> ToolCallView:
    function = FunctionCallView(name=name, arguments=arguments)
    return ToolCallView(index=index, id=new_call_id(), type="function", function=function)


def forced_call(body: ChatRequest) -> ForcedCall | None:
    """What `tools` and `tool_choice` ask for; None if no tool is to be called. Raises ApiError."""
    if not body.tools or body.tool_choice == "none":
        return None
    functions = [tool.function for tool in body.tools]
    if len({function.name for function in functions}) < len(functions):
        raise ApiError("invalid_request", "two tools have the same name: rename one", param="tools")
    if isinstance(body.tool_choice, NamedTool):
        return _named(functions, body.tool_choice.function.name)
    if body.tool_choice == "required":
        return ForcedCall(_calls_schema(functions, parallel=body.parallel_tool_calls is not False))
    raise ApiError(
        "invalid_request",
        "tool_choice 'auto' is not supported: ask for 'required', name one function, or 'none'",
        param="tool_choice",
    )


def _named(functions: Sequence[FunctionSpec], name: str) -> ForcedCall:
    for function in functions:
        if function.name == name:
            return ForcedCall(dict(_parameters(function)), name)
    raise ApiError(
        "invalid_request", f"tool_choice names {name[:80]!r}, which is not among the tools", param="tool_choice"
    )


def _parameters(function: FunctionSpec) -> Mapping[str, Any]:
    return _NO_ARGUMENTS if function.parameters is None else function.parameters


def _calls_schema(functions: Sequence[FunctionSpec], *, parallel: bool) -> dict[str, Any]:
    """An array of {"name", "parameters"}. Definitions that parameters refer to move to where they are looked for."""
    definitions: dict[str, Any] = {}
    calls = []
    for function in functions:
        parameters = dict(_parameters(function))
        for name, definition in parameters.pop("$defs", {}).items():
            if definitions.setdefault(name, definition) != definition:
                message = f"two tools define {name!r} in $defs, differently: rename one"
                raise ApiError("invalid_request", message, param="tools")
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
    return schema | ({"$defs": definitions} if definitions else {})
