"""OpenAI's `model` field as a selection."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InvalidSelection
from service.api.deps import ApiSettings
from service.api.model_names import model_of, parse_model, selection_spec
from service.api.schemas.generate import BlendPart, SelectionFields
from service.engine.selection import Mode, SelectedAdapter, Selection, SelectionSpec, WeightedName

SETTINGS = ApiSettings("org/base", frozenset({"org/base", "alias"}))
DIGITS = "0123abcd" * 8


@pytest.mark.parametrize(
    ("model", "terms"),
    [
        ("sql", [("sql", 1.0)]),
        ("sql:0.7+style:0.3", [("sql", 0.7), ("style", 0.3)]),
        ("sql:1+style:-0.5", [("sql", 1.0), ("style", -0.5)]),
        ("sql+style", [("sql", 1.0), ("style", 1.0)]),
        ("sql:.5", [("sql", 0.5)]),
        ("sql:1e+3+b", [("sql", 1000.0), ("b", 1.0)]),
        ("sql:1+3b", [("sql", 1.0), ("3b", 1.0)]),
        (f"sql@sha256:{DIGITS}", [(f"sql@sha256:{DIGITS}", 1.0)]),
        ("a@sha256:0123abcd:2+b@sha256:0123abcd", [("a@sha256:0123abcd", 2.0), ("b@sha256:0123abcd", 1.0)]),
        ("sql@md5:00000000", [("sql@md5:00000000", 1.0)]),
    ],
)
def test_what_a_model_means(model: str, terms: list[tuple[str, float]]) -> None:
    assert parse_model(model) == tuple(WeightedName(*term) for term in terms)


@pytest.mark.parametrize(
    "model", ["", "a+", "+a", "a++b", "sql:", "a:b", "sql:1e+3x", "../x", "a b", "a:0.5 + b:0.5", "é"]
)
def test_what_is_no_model_is_a_name_that_none_has(model: str) -> None:
    assert parse_model(model) == (WeightedName(model),)


@pytest.mark.parametrize("long", ["a:" + "1" * 100_000, "a:1." + "1" * 100_000, "a@" + ":1" * 50_000, "a" * 100_000])
def test_a_long_text_is_refused_in_time(long: str) -> None:
    """Were there two ways to match its digits, this would take minutes."""
    for model in (f"{long}!", f"{long}+"):
        assert parse_model(model) == (WeightedName(model),)


@given(st.text(max_size=40))
def test_any_text_is_parsed_to_something(model: str) -> None:
    assert parse_model(model)


@given(
    st.lists(
        st.tuples(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True), st.floats(-1e4, 1e4)),
        min_size=1,
        max_size=4,
    )
)
def test_a_blend_written_is_the_blend_read(terms: list[tuple[str, float]]) -> None:
    model = "+".join(f"{name}:{weight!r}" for name, weight in terms)
    assert parse_model(model) == tuple(WeightedName(*term) for term in terms)


def spec(model: str | None, **fields: object) -> SelectionSpec:
    return selection_spec(model, SelectionFields(**fields), SETTINGS)  # type: ignore[arg-type]


SQL, BASE_ITSELF = SelectionSpec((WeightedName("sql"),)), SelectionSpec(())


def test_model_and_fields_say_one_thing() -> None:
    assert spec(None) == SelectionSpec(None), "the active adapter, if there is one"
    assert spec("org/base") == spec("alias") == spec("base") == BASE_ITSELF
    assert spec("sql") == spec(None, adapter="sql") == spec("sql", adapter="sql") == SQL
    assert spec("org/base", adapter="sql") == SQL, "the base's id says on which base"
    assert spec("org/base", adapter="base") == BASE_ITSELF
    assert spec("sql", mode="merge").mode is Mode.MERGE
    assert spec("org/base", mode="merge").mode is Mode.MERGE
    blend = [BlendPart(name="b", weight=0.5), BlendPart(name="a")]
    assert spec("a+b:0.5", adapters=blend).names == (WeightedName("a"), WeightedName("b", 0.5))


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("sql", {"adapter": "style"}),
        ("sql", {"adapter": "base"}),
        ("sql", {"adapters": [BlendPart(name="sql", weight=0.5)]}),
        ("sql:0.5+style", {"adapter": "sql"}),
        (None, {"adapter": "sql", "adapters": [BlendPart(name="sql")]}),
        ("sql:1e9", {}),
        ("+".join(["a"] * 33), {}),
        ("sql+base", {}),
    ],
)
def test_contradictions_are_refused(model: str | None, fields: dict[str, object]) -> None:
    with pytest.raises(InvalidSelection):
        spec(model, **fields)


def test_a_selection_has_a_model_name_that_means_it() -> None:
    one, other = SelectedAdapter("sql", "sha256:1"), SelectedAdapter("style", "sha256:2", -0.5)
    assert model_of(Selection(), SETTINGS) == "org/base"
    assert model_of(Selection((one,)), SETTINGS) == "sql"
    assert model_of(Selection((other,)), SETTINGS) == "style:-0.5"
    assert parse_model(model_of(Selection((one, other)), SETTINGS)) == (
        WeightedName("sql"),
        WeightedName("style", -0.5),
    )
