"""JSON from strangers, read without Python's leniency.

`json.loads` guesses encodings, takes NaN and Infinity, turns 1e400 into infinity and keeps the last of two equal keys.
Two readers of one file must not see two different adapters, so all of that is refused here.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def parse(raw: bytes | str) -> Any:
    """The value of a JSON text, in UTF-8 without a byte order mark. Raises ValueError that says what is wrong."""
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    try:
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except RecursionError as error:
        raise ValueError("it is nested without end") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated!r} stands twice")
    return values


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which is no JSON")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is beyond what a float holds")
    return value
