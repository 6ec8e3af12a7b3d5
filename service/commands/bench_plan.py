"""What a measurement asks of a server: prompts, adapters by popularity, arrivals. A seed gives the same each time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from pathlib import Path

from service.commands import UsageError

Prompt = str | tuple[int, ...]

# Ordinary words, of which prompts are made: every tokenizer has them, in one token or a few.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service "
    "friend father power hour game line end member law car city name team minute idea body back parent face "
    "others level office door health person art war history party result change morning reason research girl guy "
    "moment air teacher force"
)
WORDS = _TEXT.split()


class Popularity(StrEnum):
    """ROUND_ROBIN: each adapter in turn. ZIPF: the k-th is asked for with a weight of 1/k."""

    ROUND_ROBIN = "round-robin"
    ZIPF = "zipf"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: greedy, of one adapter or `base`."""

    adapter: str
    prompt: Prompt
    max_new_tokens: int


def deal(adapters: Sequence[str], count: int, popularity: Popularity, seed: int) -> list[str]:
    """Whom each of `count` requests is for."""
    if popularity is Popularity.ROUND_ROBIN:
        return [adapters[i % len(adapters)] for i in range(count)]
    weights = [1 / rank for rank in range(1, len(adapters) + 1)]
    return random.Random(f"popularity-{seed}").choices(adapters, weights, k=count)


def arrivals(count: int, per_second: float, seed: int | str) -> list[float]:
    """Seconds from the start: a Poisson process. A seed draws the same pattern for every rate."""
    draws = random.Random(f"arrivals-{seed}")
    return list(accumulate(draws.expovariate(1.0) / per_second for _ in range(count)))


def random_prompts(count: int, length: int, pool: Sequence[int], seed: int) -> Iterator[Prompt]:
    """Prompts of `length` tokens drawn from the pool, no two alike; of as many words if the pool is empty.

    A server that remembers prompts would otherwise answer some of them from memory.
    """
    draws = random.Random(f"prompts-{seed}")
    for _ in range(count):
        yield tuple(draws.choices(pool, k=length)) if pool else " ".join(draws.choices(WORDS, k=length))


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: of `.jsonl` a line each of JSON, with a `prompt` or one itself; else a line of text each.

    Raises UsageError for a file that has none, and for a line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"the prompt file {path} cannot be read: {reason}") from error
    is_json = path.suffix == ".jsonl"
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = [_json_prompt(line, f"line {number} of {path}") if is_json else line for number, line in numbered]
    if not prompts:
        raise UsageError(f"the prompt file {path} is empty: write a prompt a line")
    return prompts


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(i) is int and i >= 0 for i in prompt):
        return tuple(prompt)
    raise UsageError(f"{where} holds no prompt: write a text or a list of token ids, or an object with that as prompt")
