"""The classes of a merged classifier, as its config names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.heads import ClassifierHead
from service.api.label_files import own_labels
from service.commands import CommandError


def classes_config(base: Mapping[str, Any], directories: Sequence[Path], head: ClassifierHead) -> dict[str, Any]:
    """`id2label`, `label2id` and, if an adapter says it, `problem_type`: as a server names the classes of a blend.

    Raises CommandError for heads that differ in their number of labels.
    """
    own = [own_labels(directory, head) for directory in directories]
    counts = sorted({each.count for each in own})
    if len(counts) > 1:
        told = " and ".join(map(str, counts))
        raise CommandError(f"the adapters have heads for {told} labels: only equal numbers can be merged")
    names = {each.names for each in own} - {None} or {_names(base.get("id2label"))}
    agreed = names.pop() if len(names) == 1 else None
    if agreed is None or len(agreed) != counts[0]:
        agreed = tuple(f"LABEL_{i}" for i in range(counts[0]))
    types = {each.problem_type for each in own} - {None}
    config: dict[str, Any] = {
        "id2label": {str(i): name for i, name in enumerate(agreed)},
        "label2id": {name: i for i, name in enumerate(agreed)},
    }
    return {**config, "problem_type": types.pop()} if len(types) == 1 else config


def _names(id2label: object) -> tuple[str, ...] | None:
    if not isinstance(id2label, dict):
        return None
    return tuple(str(id2label.get(str(i))) for i in range(len(id2label)))
