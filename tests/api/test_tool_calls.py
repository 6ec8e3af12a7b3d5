"""Reading calls from a model's output."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.json_text import elements, members
from service.api.tool_calls import CallArray, OutputReader, TaggedCalls, joined

DEEP = "[" * 100_000 + "]" * 100_000
WRITTEN = '{"b":1e400 ,"a": [1.50, 12345678901234567890e0],"a": "\\u00e9\\ud83d", "n": ' + "9" * 5000 + "}"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
)


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (CallArray(), f'[{{"name": "f", "parameters": {WRITTEN}}}, {{"parameters": {WRITTEN}, "name": "f"}}]'),
        (TaggedCalls(), f'<tool_call>\n{{"name": "f", "arguments": {WRITTEN}}}\n</tool_call>'),
        (TaggedCalls(), f'<tool_call>{{"name": "f", "arguments": {json.dumps(WRITTEN)}}}</tool_call>'),
    ],
)
def test_arguments_are_what_the_model_wrote(reader: OutputReader, text: str) -> None:
    read = joined([reader.push(text), reader.finish()])
    assert {call.function.arguments for call in read.tool_calls or ()} == {WRITTEN}
    assert {call.function.name for call in read.tool_calls or ()} == {"f"}


@given(st.dictionaries(st.text(), JSON), st.sampled_from([None, 1]))
def test_an_object_is_taken_apart(value: dict[str, object], indent: int | None) -> None:
    taken = members(f" {json.dumps(value, indent=indent)}\n")
    assert {name: json.loads(text) for name, text in taken.items()} == value
    assert elements(json.dumps([*taken.values()], indent=indent)) == [json.dumps(text) for text in taken.values()]


@pytest.mark.parametrize(
    "text", ["", "{", "{}x", "[]", '{"a"}', '{"a":}', '{"a":1,}', '{"a":1 "b":2}', "{1:2}", '{"a":NaN}', '{"a":1]', "1"]
)
def test_what_is_no_object_is_said(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - JSON's own messages vary
        members(text)


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (CallArray(), f'[{{"name": "f", "parameters": {DEEP}}}]'),
        (TaggedCalls(), f'<tool_call>{{"name": "f", "arguments": {DEEP}}}</tool_call>'),
    ],
)
def test_a_call_nested_too_deep_to_read_is_text(reader: OutputReader, text: str) -> None:
    read = joined([reader.push(text), reader.finish()])
    assert read.content == text
    assert not read.tool_calls
    assert not reader.called
