"""What Python's json reads and other readers read differently, or not at all."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import strict_json

REFUSED = {
    "NaN": (b"NaN", "NaN"),
    "infinity": (b'{"a": -Infinity}', "-Infinity"),
    "infinity by overflow": (b"[1e400]", "1e400"),
    "a long overflow": (b"1" + b"0" * 400 + b".0", "beyond what a float holds"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 1}', "'a' stands twice"),
    "a nested key twice": (b'[{"x": {"k": 1, "k": 1}}]', "'k' stands twice"),
    "a key twice, spelt differently": (b'{"a": 1, "\\u0061": 2}', "'a' stands twice"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "UTF-32 without a mark": ('{"a": 1}'.encode("utf-32-le"), ""),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "utf-8"),
    "a surrogate in UTF-8": (b'"\xed\xa0\x80"', "utf-8"),
    "nesting without end": (b"[" * 200_000, "nested without end"),
    "objects without end": (b'{"a":' * 100_000, "nested without end"),
    "a number of 5000 digits": (b"1" * 5000, "digits"),
    "two values": (b"{} {}", "Extra data"),
    "a zero byte": (b"{}\0", "Extra data"),
    "empty": (b"", "Expecting value"),
    "a comment": (b"{} // x", "Extra data"),
}


@pytest.mark.parametrize(("raw", "word"), REFUSED.values(), ids=REFUSED)
def test_refuses(raw: bytes, word: str):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the word is looked for below
        strict_json.parse(raw)
    assert word in str(refusal.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values, st.booleans())
def test_reads_what_is_json(value: object, ascii_only: bool):
    assert strict_json.parse(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")) == value


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_a_value_error(raw: bytes):
    try:
        value = strict_json.parse(raw)
    except ValueError:
        return
    assert strict_json.parse(json.dumps(value)) == value
