"""What a classifier's classes are called, and how many an adapter tells apart.

An adapter may say it itself: in `labels.json` among its files (a list of names, or {"0": "negative", …}), else as
`id2label` in its config, where `problem_type` may stand too. Else the base's names count, if it has as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapters import strict_json
from adapters.config import CONFIG_FILE
from adapters.errors import BadConfig
from adapters.heads import ClassifierHead, label_count
from adapters.reading import read_adapter_layout
from service.api.adapter_files import LABELS_FILE, unless_deleted

MAX_NAME = 1000  # characters
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True, slots=True)
class OwnLabels:
    """What an adapter says of its classes."""

    count: int
    names: tuple[str, ...] | None
    problem_type: str | None


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
def own_labels(directory: Path, head: ClassifierHead) -> OwnLabels:
    with unless_deleted(directory):
        return _read(directory, head)
    raise AssertionError("unless_deleted raises or lets through")


def _read(directory: Path, head: ClassifierHead) -> OwnLabels:
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
    return OwnLabels(label_count(layout.extras, head), names, problem_type)


def _file_labels(directory: Path) -> tuple[str, ...] | None:
    path = directory / LABELS_FILE
    if not path.is_file():
        return None
    try:
        return _names(strict_json.parse(path.read_bytes()), LABELS_FILE, LABELS_FILE)
    except ValueError as error:
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
    if any("\ud800" <= character <= "\udfff" for name in value for character in name):
        raise BadConfig(
            f"a label in {file} holds half of a surrogate pair, which is no character: no answer could name it",
            subject=subject,
        )
    return tuple(value)
