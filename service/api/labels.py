"""What a classifier's classes are called, and how many an adapter tells apart.

An adapter may say it itself: in `labels.json` among its files (a list of names, or {"0": "negative", …}), else as
`id2label` in its config, where `problem_type` may stand too. Else the base's names count, if it has as many.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapters.config import CONFIG_FILE
from adapters.errors import BadConfig
from adapters.heads import ClassifierHead, label_count
from adapters.reading import read_adapter_layout
from service.api.adapter_files import LABELS_FILE, unless_deleted
from service.api.deps import ServerState
from service.api.errors import ApiError
from service.engine.selection import Selection

MAX_NAME = 1000  # characters
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True, slots=True)
class Classes:
    """`names` has one for each class; `problem_type` is transformers' word for how logits are read, if given."""

    names: tuple[str, ...]
    problem_type: str | None = None

    def probabilities(self, logits: Sequence[float]) -> list[float]:
        """Softmax; sigmoid of a single class, or several that may be at once; a regression as it is."""
        if self.problem_type == "regression":
            return list(logits)
        if self.problem_type == "multi_label_classification" or len(logits) == 1:
            return [_sigmoid(logit) for logit in logits]
        highest = max(logits)
        powers = [math.exp(logit - highest) for logit in logits]
        total = sum(powers)
        return [power / total for power in powers]


@dataclass(frozen=True, slots=True)
class _Own:
    """What an adapter says of its classes."""

    count: int
    names: tuple[str, ...] | None
    problem_type: str | None


def classes_of(state: ServerState, selection: Selection) -> Classes:
    """The classes that a selection tells apart. Reads files: not for the event loop.

    Raises ApiError for the base without a trained head, and for a blend of heads that differ in their number.
    """
    head, serving = state.registry.head, state.pooled
    assert head is not None, "a classifier has a head"
    assert serving is not None, "a classifier pools"
    if selection.is_base and not head.is_trained:
        raise ApiError(
            "invalid_request",
            f"the base model has no trained {' and '.join(sorted(head.untrained))}, and cannot classify alone: name "
            "an adapter",
            param="adapter",
        )
    own = [_own_of(state.store.path(adapter.digest), head) for adapter in selection.adapters]
    if len({each.count for each in own}) > 1:
        named = zip(selection.adapters, own, strict=True)
        told = ", ".join(f"{adapter.name!r} has {each.count}" for adapter, each in named)
        raise ApiError(
            "invalid_request",
            f"heads are blended only where they have the same labels, and these differ in number: {told}",
            param="adapters",
        )
    count = own[0].count if own else head.labels
    names = {each.names for each in own} - {None} or {serving.labels}
    agreed = names.pop() if len(names) == 1 else None
    types = {each.problem_type for each in own} - {None} or {serving.problem_type}
    fitting = agreed if agreed is not None and len(agreed) == count else tuple(f"LABEL_{i}" for i in range(count))
    return Classes(fitting, types.pop() if len(types) == 1 else None)


def check_labels(directory: Path, head: ClassifierHead | None) -> None:
    """Raises BadConfig for labels that cannot be read, or, on a classifier, that are not as many as the head's."""
    if head is None:
        _file_labels(directory)
        return
    own = _read(directory, head)
    if own.names is not None and len(own.names) != own.count:
        raise BadConfig(
            f"the adapter names {len(own.names)} labels and its head has {own.count}: name each once",
            subject=LABELS_FILE if (directory / LABELS_FILE).is_file() else "id2label",
        )


@lru_cache(maxsize=4096)  # a stored version never changes
def _own_of(directory: Path, head: ClassifierHead) -> _Own:
    with unless_deleted(directory):
        return _read(directory, head)
    raise AssertionError("unless_deleted raises or lets through")


def _read(directory: Path, head: ClassifierHead) -> _Own:
    layout = read_adapter_layout(directory)
    extra = layout.config.extra
    names = _file_labels(directory)
    if names is None and extra.get("id2label") is not None:
        names = _names(extra["id2label"], CONFIG_FILE, "id2label")
    problem_type = extra.get("problem_type")
    if problem_type is not None and problem_type not in _PROBLEM_TYPES:
        raise BadConfig(
            f"problem_type is {str(problem_type)[:80]!r}; it must be one of {', '.join(_PROBLEM_TYPES)}",
            subject="problem_type",
        )
    return _Own(label_count(layout.extras, head), names, problem_type)


def _file_labels(directory: Path) -> tuple[str, ...] | None:
    path = directory / LABELS_FILE
    if not path.is_file():
        return None
    try:
        return _names(json.loads(path.read_text(encoding="utf-8")), LABELS_FILE, LABELS_FILE)
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{LABELS_FILE} is not valid JSON: {error}", subject=LABELS_FILE) from error


def _names(value: Any, file: str, subject: str) -> tuple[str, ...]:
    """Names in the order of the classes, from a list of them or an object by class."""
    if isinstance(value, Mapping):
        value = [value.get(str(i)) for i in range(len(value))]
    if not (isinstance(value, list) and value and all(isinstance(name, str) for name in value)):
        raise BadConfig(
            f'the labels in {file} must be a list of names, or an object {{"0": "first", "1": "second", …}}',
            subject=subject,
        )
    if any(len(name) > MAX_NAME for name in value):
        raise BadConfig(f"a label in {file} has more than {MAX_NAME:,} characters", subject=subject)
    return tuple(value)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else 1 - 1 / (1 + math.exp(logit))
