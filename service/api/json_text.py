"""JSON taken apart and not written anew: the values of an object or an array, each as it was written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_SPACE = re.compile(r"[ \t\n\r]*")


def members(text: str) -> dict[str, str]:
    """The texts of an object's values by name, of a name given twice the last one's.

    Raises ValueError for what is no JSON object, RecursionError for one nested too deep.
    """
    return dict(_items(text, "{", "}"))


def elements(text: str) -> list[str]:
    """The texts of an array's elements. Raises as `members` does."""
    return [value for _, value in _items(text, "[", "]")]


def _items(text: str, opening: str, closing: str) -> Iterator[tuple[str, str]]:
    """(name, value); an array's have no names."""
    at = _skip(text, _take(text, 0, opening))
    more = not text.startswith(closing, at)
    while more:
        name = ""
        if opening == "{":
            start = _skip(text, at)
            at = _end(text, start)
            if text[start] != '"':
                raise ValueError("a name must be a string")
            name = json.loads(text[start:at])
            at = _take(text, at, ":")
        start = _skip(text, at)
        at = _end(text, start)
        yield name, text[start:at]
        at = _skip(text, at)
        more = text.startswith(",", at)
        at += more
    if _skip(text, _take(text, at, closing)) != len(text):
        raise ValueError("something follows the JSON")


def _take(text: str, at: int, expected: str) -> int:
    at = _skip(text, at)
    if not text.startswith(expected, at):
        raise ValueError(f"{expected!r} is missing")
    return at + 1


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None, "it matches nothing too"
    return space.end()


def _end(text: str, start: int) -> int:
    """Where the value ends that begins there."""
    return _DECODER.raw_decode(text, start)[1]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Numbers are never converted: there are some that Python's types cannot hold.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_no_constant)
