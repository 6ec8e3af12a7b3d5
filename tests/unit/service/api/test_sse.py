"""Frames of server-sent events."""

from __future__ import annotations

import json
import sys

from service.api.errors import ApiError
from service.api.sse import data_frame, error_frame

EVERYTHING = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))


def test_whatever_a_model_writes_is_one_line_to_any_client() -> None:
    frame = data_frame(json.dumps({"text": EVERYTHING}, ensure_ascii=False))
    line, empty, *more = frame.split("\n")
    assert (empty, more) == ("", [""])
    assert line.splitlines() == [line], "Unicode knows more ends of lines than \\n"
    assert json.loads(line.removeprefix("data: ")) == {"text": EVERYTHING}


def test_errors_too() -> None:
    frame = error_frame(ApiError("invalid_request", "no adapter 'a\u2028b'"))
    assert len(frame.splitlines()) == 3
    assert json.loads(frame.splitlines()[1].removeprefix("data: "))["error"]["message"] == "no adapter 'a\u2028b'"
