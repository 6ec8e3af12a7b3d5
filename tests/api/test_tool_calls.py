"""Reading calls from a model's output."""

from __future__ import annotations

import pytest

from service.api.tool_calls import CallArray, OutputReader, TaggedCalls, joined

DEEP = "[" * 100_000 + "]" * 100_000


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
