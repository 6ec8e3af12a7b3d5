"""The commands in the documentation, with the answers that it shows: find them, and compare.

A documented command stands in a ```console block behind `$ `, its answer below it up to the next command.
`tests.documented_pages` runs them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

_LONGEST_LIST = 3
_LINE = 110

# What differs from run to run, or from machine to machine: only its type is compared.
VOLATILE = {
    "id", "created", "created_at", "updated_at", "last_used", "text", "token_ids", "queue_s", "first_token_s",
    "total_s", "version", "torch", "transformers", "python", "logprob", "token", "token_id",
    "completion_tokens", "total_tokens", "finish_reason", "resident_bytes", "state", "merge_error",
    "merge_error_layer", "fingerprint", "pins",
    "content", "system_fingerprint", "token_logprobs", "generated_text", "sha256", "request_id", "vblora_serve",
    "time", "uptime_s", "count", "p50", "p95", "cached_tokens", "process_bytes", "kv_bytes",
    "prefix_bytes", "adapter_compact_bytes", "adapter_factor_bytes",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """One command of a page, and the answer that stands below it."""

    text: str
    answer: str


def commands_in(block: str) -> Iterator[Command]:
    """The commands of a console block. One goes on in the next line after a backslash and within quotes."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.rstrip("\n").split("\n")
        length = next(i for i in range(1, len(lines) + 1) if _is_whole("\n".join(lines[:i])))
        yield Command("\n".join(lines[:length]), "\n".join(lines[length:]))


def _is_whole(command: str) -> bool:
    try:
        shlex.split(command)
    except ValueError:
        return False
    return not command.endswith("\\")


def shown(answer: str) -> str:
    """An answer as documents show it: JSON indented, with long lists cut; everything else as it is."""
    try:
        return _laid_out(_cut(json.loads(answer)), "")
    except ValueError:
        return answer


def _laid_out(value: Any, indent: str) -> str:
    """JSON in which whatever fits a line is on one."""
    line = json.dumps(value, ensure_ascii=False)
    if not value or not isinstance(value, (dict, list)) or len(indent) + len(line) <= _LINE:
        return line
    inner = indent + "  "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _laid_out(each, inner) for each in value) + f"\n{indent}]"
    pairs = (f"{inner}{json.dumps(key)}: {_laid_out(each, inner)}" for key, each in value.items())
    return "{\n" + ",\n".join(_filled(list(pairs), inner)) + f"\n{indent}}}"


def _filled(pairs: list[str], indent: str) -> Iterator[str]:
    """Neighbouring pairs together on a line, as long as they fit."""
    line = pairs[0]
    for pair in pairs[1:]:
        if "\n" not in line + pair and len(line) + len(pair) - len(indent) + 2 <= _LINE:
            line += ", " + pair.removeprefix(indent)
        else:
            yield line
            line = pair
    yield line


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut(inner) for key, inner in value.items()}
    if isinstance(value, list):
        cut = [_cut(inner) for inner in value[:_LONGEST_LIST]]
        return [*cut, "…"] if len(value) > _LONGEST_LIST else cut
    return value


def differences(documented: str, actual: str, volatile: Set[str] = VOLATILE) -> list[str]:
    """Where an answer is not what the page says, volatile values aside; empty if it is."""
    try:
        expected, got = json.loads(documented), json.loads(shown(actual))
    except ValueError:
        return [] if _steady(documented) == _steady(actual) else [f"documented:\n{documented}\nactual:\n{actual}"]
    return list(_compare("", expected, got, volatile))


def _steady(text: str) -> str:
    """Plain text without its numbers, digests and generated words."""
    text = re.sub(r'"text":"[^"]*"', '"text":""', text)
    text = re.sub(r'"(id|token_ids)":("[^"]*"|\[[^]]*\])', r'"\1":0', text)
    return re.sub(r"[0-9a-f]{12,}|\d+(\.\d+)?(e-?\d+)?", "0", text)


def _compare(where: str, expected: Any, got: Any, volatile: Set[str]) -> Iterator[str]:
    name = where.rsplit(".", 1)[-1]
    if isinstance(expected, dict) and isinstance(got, dict):
        if expected.keys() != got.keys():
            yield f"{where}: keys {sorted(expected)} documented, {sorted(got)} answered"
            return
        for key in expected:
            yield from _compare(f"{where}.{key}", expected[key], got[key], volatile)
    elif name in volatile:
        if expected is not None and got is not None and type(expected) is not type(got):
            yield f"{where}: {expected!r} documented, {got!r} answered"
    elif isinstance(expected, list) and isinstance(got, list):
        if len(expected) != len(got):
            yield f"{where}: {len(expected)} items documented, {len(got)} answered"
        for i, (one, other) in enumerate(zip(expected, got, strict=False)):
            yield from _compare(f"{where}[{i}]", one, other, volatile)
    elif expected != got:
        yield f"{where}: {expected!r} documented, {got!r} answered"
