"""OpenAI's `model` field as a selection: the base's id, an adapter, one version of it, or a blend.

sql    sql@sha256:8f1c20ab    sql:0.7+style:0.3    sql:1+style:-0.5
"""

from __future__ import annotations

import re
from collections import Counter

from adapters.errors import InvalidSelection
from service.api.deps import ApiSettings
from service.api.schemas.generate import SelectionFields
from service.engine.selection import Selection, SelectionSpec, WeightedName

# Each part can match a text in one way only: a second would make the time to refuse a long text its length squared.
_TERM = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9._-]*(?:@sha256:[0-9a-f]*|@[^+]*)?)"
    r"(?::(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?))?"
    r"(?:\+(?=.)|$)",
    re.ASCII | re.IGNORECASE,
)


def selection_spec(model: str | None, fields: SelectionFields, settings: ApiSettings) -> SelectionSpec:
    """What a request to an OpenAI route asks for. Raises InvalidSelection if `model` and the fields disagree.

    The base's id beside `adapter` or `adapters` only says what they are adapters of.
    """
    asked = fields.selection_spec()
    if model is None:
        return asked
    if settings.means_base(model):
        return SelectionSpec((), asked.mode) if asked.names is None else asked
    named = parse_model(model)
    if asked.names is not None and Counter(asked.names) != Counter(named):
        raise InvalidSelection(
            f"model is {model[:140]!r} and the adapter fields say something else: give one of the two, or the base's "
            "id as model",
            subject="model",
        )
    return SelectionSpec.of(None, named, fields.mode)


def parse_model(model: str) -> tuple[WeightedName, ...]:
    """The terms of a blend, or one name. A text that is neither is taken for a name, which no adapter has."""
    terms: list[WeightedName] = []
    at = 0
    while at < len(model):
        term = _TERM.match(model, at)
        if term is None:
            break
        terms.append(WeightedName(term["name"], float(term["weight"] or 1.0)))
        at = term.end()
    return tuple(terms) if terms and at == len(model) else (WeightedName(model),)


def model_of(selection: Selection, settings: ApiSettings) -> str:
    """What a selection is called in the `model` field."""
    return settings.served_model_name if selection.is_base else selection.names
