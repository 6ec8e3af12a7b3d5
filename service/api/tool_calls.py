"""Reading a model's output as it comes: plain text, the arguments of a forced call, or calls among text.

A reader takes one choice's text piece by piece and says what is new, as a chat's stream sends it; a whole answer is
the sum of these. A call's arguments are passed on as the model wrote them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from service.api.json_text import elements, members
from service.api.schemas.chat import ChatDelta, FunctionCallView, ToolCallView
from service.engine.detokenizer import overlap

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class OutputReader(Protocol):
    @property
    def called(self) -> bool:
        """Whether what was read so far holds a call that the model chose, which ends with `tool_calls`."""
        ...

    def push(self, text: str) -> ChatDelta:
        """What is new with some more text; a delta without fields if nothing is."""
        ...

    def finish(self) -> ChatDelta:
        """What was held back, once the text has ended."""
        ...


class PlainText:
    called = False

    def push(self, text: str) -> ChatDelta:
        return ChatDelta(content=text) if text else ChatDelta()

    def finish(self) -> ChatDelta:
        return ChatDelta()


class Arguments:
    """A call of the one tool that was named: the text is its arguments. The model chose nothing."""

    called = False

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def push(self, text: str) -> ChatDelta:
        if not self._begun:
            self._begun = True
            return ChatDelta(tool_calls=[_call(0, self._name, text)])
        return ChatDelta(tool_calls=[_more(text)]) if text else ChatDelta()

    def finish(self) -> ChatDelta:
        return ChatDelta() if self._begun else self.push("")


class CallArray:
    """A forced call of some tools: the text is [{"name": …, "parameters": …}, …], read when it is whole.

    One that was cut off is text.
    """

    def __init__(self) -> None:
        self._text = ""
        self.called = False

    def push(self, text: str) -> ChatDelta:
        self._text += text
        return ChatDelta()

    def finish(self) -> ChatDelta:
        try:
            written = [members(call) for call in elements(self._text)]
            calls = [_call(i, json.loads(call["name"]), call["parameters"]) for i, call in enumerate(written)]
        except (ValueError, RecursionError):
            return ChatDelta(content=self._text)
        self.called = True
        return ChatDelta(tool_calls=calls)


class TaggedCalls:
    """Text in which a call is <tool_call>{"name": …, "arguments": …}</tool_call>, as Hermes and Qwen models write it.

    What is tagged and no call is text. Calls beyond the `most` that were asked for are left out.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._held = ""
        self._inside = False
        self._calls = 0

    @property
    def called(self) -> bool:
        return self._calls > 0

    def push(self, text: str) -> ChatDelta:
        self._held += text
        return self._read(last=False)

    def finish(self) -> ChatDelta:
        return self._read(last=True)

    def _read(self, *, last: bool) -> ChatDelta:
        content, calls = "", []
        while True:
            tag = _CLOSE if self._inside else _OPEN
            before, found, after = self._held.partition(tag)
            if not found:
                break
            self._held = after
            if not self._inside:
                content += before
            elif (call := _parse(before)) is not None:
                if self._calls != self._most:
                    calls.append(_call(self._calls, *call))
                    self._calls += 1
            else:
                content += f"{_OPEN}{before}{_CLOSE}"
            self._inside = not self._inside
        if last:
            content += (_OPEN if self._inside else "") + self._held
            self._held, self._inside = "", False
        elif not self._inside:
            kept = overlap(self._held, _OPEN)
            content += self._held[: len(self._held) - kept]
            self._held = self._held[len(self._held) - kept :]
        return _delta(content, calls)


def joined(deltas: Sequence[ChatDelta]) -> ChatDelta:
    """Deltas of one choice as one. What is empty is left out."""
    content = "".join(delta.content or "" for delta in deltas)
    return _delta(content, [call for delta in deltas for call in delta.tool_calls or ()])


def _delta(content: str, calls: list[ToolCallView]) -> ChatDelta:
    fields: dict[str, Any] = {"content": content, "tool_calls": calls}
    return ChatDelta(**{name: value for name, value in fields.items() if value})


def _parse(text: str) -> tuple[str, str] | None:
    """The name and the arguments, which may be written as JSON or as a string of JSON; None if it is no call."""
    try:
        call = members(text)
    except (ValueError, RecursionError):
        return None
    name, arguments = call.get("name", ""), call.get("arguments", "{}")
    if not name.startswith('"'):
        return None
    return json.loads(name), json.loads(arguments) if arguments.startswith('"') else arguments


def _call(index: int, name: str, arguments: str) -> ToolCallView:
    function = FunctionCallView(name=_sendable(name), arguments=_sendable(arguments))
    return ToolCallView(index=index, id=f"call_{uuid.uuid4().hex[:24]}", type="function", function=function)


def _sendable(text: str) -> str:
    """Half a surrogate pair, which JSON's \\ud800 alone has got into, is that escape again: no answer can carry it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _more(arguments: str) -> ToolCallView:
    return ToolCallView(index=0, function=FunctionCallView(arguments=arguments))
