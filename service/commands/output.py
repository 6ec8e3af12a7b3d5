"""What commands print: columns and JSON on stdout, warnings on stderr. No control codes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from service.logs import printable

if TYPE_CHECKING:  # both import torch, which not every command needs
    from adapters.parameters import LoRAParameterCount, ParameterCount
    from adapters.targets import LayerShape

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def say(text: str = "") -> None:
    """One line on stdout. A checkpoint's names are a stranger's: they do not get to drive the terminal."""
    print(printable(text))


def complain(text: str) -> None:
    """One line on stderr."""
    print(printable(text), file=sys.stderr)


def show_json(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def show_columns(rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Rows of words, in columns as wide as their widest word."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (word.ljust(width) for word, width in zip(row, widths, strict=True))
        say((indent + "  ".join(padded)).rstrip())


def show_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Names and values in two columns; what is None or empty is left out."""
    show_columns([(name, str(value)) for name, value in facts if value is not None and value != ""])


def show_layers(layers: Iterable[LayerShape]) -> None:
    """One row for the layers that differ in their number alone: 32 decoder layers are not 32 lines."""
    groups: dict[tuple[str, int, int], list[LayerShape]] = {}
    for layer in layers:
        key = _NUMBER.sub("*", layer.name), layer.in_features, layer.out_features
        groups.setdefault(key, []).append(layer)
    rows = []
    for (pattern, in_features, out_features), members in groups.items():
        name = pattern if len(members) > 1 else members[0].name
        rows.append((name, f"{in_features}→{out_features}", f"× {len(members)}"))
    show_columns(rows, indent="  ")


def show_counts(count: ParameterCount | LoRAParameterCount) -> None:
    """Every number of a parameter count, then the line that PEFT prints."""
    facts = {name: value for name, value in count.to_dict().items() if name not in ("storage", "summary")}
    show_facts((name, f"{value:,}" if isinstance(value, int) else value) for name, value in facts.items())
    say(count.summary)
