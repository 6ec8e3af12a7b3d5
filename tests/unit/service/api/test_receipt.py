"""The canonical form of a receipt, its id, and the hashes in it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from service.api.receipt import canonical, hash_of_tokens, id_of, seeded
from service.engine.sequence import SamplingParams

FIELDS: dict[str, Any] = {
    "id": "sha256:0",
    "created": 1700000000,
    "base": {"fingerprint": "0123456789abcdef", "kv_backend": None},
    "sampling": {"temperature": 1.0, "top_p": 0.9, "logit_bias": {"5": -1.5}, "seed": 7, "stop": ["é", " "]},
    "choices": [{"index": 0, "sha256": "sha256:1"}, {"index": 1, "sha256": "sha256:2"}],
}


def test_the_canonical_form_is_sorted_json_without_spaces_and_without_the_id() -> None:
    assert canonical({"b": [1.0, True, None, "é\n"], "a": {"z": 0.5, "y": 1e-7}, "id": "x"}) == (
        '{"a":{"y":1e-07,"z":0.5},"b":[1,true,null,"é\\n"]}'.encode()
    )


def test_the_id_is_the_canonical_forms_hash() -> None:
    assert id_of(FIELDS) == f"sha256:{hashlib.sha256(canonical(FIELDS)).hexdigest()}"


@pytest.mark.parametrize("indent", [None, 4])
def test_neither_layout_nor_order_nor_the_spelling_of_numbers_matters(indent: int | None) -> None:
    turned = dict(reversed(FIELDS.items()))
    as_javascript = json.dumps(turned, indent=indent, ensure_ascii=False).replace("1.0", "1")
    assert id_of(json.loads(as_javascript)) == id_of(FIELDS)


def changes(value: Any) -> Iterator[Any]:
    """The value with one thing in it changed, each in turn."""
    if isinstance(value, dict):
        for key in value:
            for changed in changes(value[key]):
                yield {**value, key: changed}
            yield {other: inner for other, inner in value.items() if other != key}
        yield {**value, "more": 1}
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from ([*value[:i], changed, *value[i + 1 :]] for changed in changes(value[i]))
            yield [*value[:i], *value[i + 1 :]]
        yield value[::-1]
    else:
        yield f"{value}0" if isinstance(value, str) else (value or 0) + 1


def test_every_change_is_noticed() -> None:
    fields = {name: value for name, value in FIELDS.items() if name != "id"}
    changed = list(changes(copy.deepcopy(fields)))
    ids = {id_of(each) for each in changed}
    assert len(changed) > 30
    assert id_of(fields) not in ids


def test_what_is_no_json_has_no_canonical_form() -> None:
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical({"a": number})


def test_the_hash_of_tokens_is_of_eight_bytes_each() -> None:
    data = bytes([1, 0, 0, 0, 0, 0, 0, 0]) + bytes([0, 1, 0, 0, 0, 0, 0, 0])
    assert hash_of_tokens([1, 256]) == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert hash_of_tokens([]) == f"sha256:{hashlib.sha256(b'').hexdigest()}"


def test_a_seed_is_drawn_where_one_is_needed_and_survives_json_libraries_of_floats() -> None:
    assert seeded(SamplingParams(temperature=0.0)).seed is None
    assert seeded(SamplingParams(seed=3)).seed == 3
    drawn = [seeded(SamplingParams()).seed for _ in range(20)]
    assert len(set(drawn)) == 20
    assert all(seed is not None and 0 <= seed + 127 <= 2**53 for seed in drawn)
