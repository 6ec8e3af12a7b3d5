"""What is asked of a server: a random mix over every route that generates. A seed gives the same mix each time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

_LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ,.0123456789"
_SHARED = "Every one of these prompts begins alike, so that its keys and values may be found in the prefix cache. "


@dataclass(frozen=True, slots=True)
class Leaving:
    """When a client goes away: after so many events of its stream, or so long after it asked, whichever is first."""

    events: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `name` is its X-Request-ID, so that the server's log and this side can be held together."""

    name: str
    path: str
    body: Mapping[str, Any]
    leaving: Leaving | None = None

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass(frozen=True, slots=True)
class Mix:
    """What a load is made of. `tokens` bounds each answer, `longest` each prompt; `leaving` the share that leaves."""

    adapters: tuple[str, ...]
    tokens: int = 24
    longest: int = 120
    leaving: float = 0.0

    def asks(self, count: int, seed: int | str) -> list[Ask]:
        pick = random.Random(f"{seed}")
        return [self._ask(pick, f"load-{seed}-{i}") for i in range(count)]

    def _ask(self, pick: random.Random, name: str) -> Ask:
        make: Callable[[random.Random], tuple[str, dict[str, Any]]]
        make = pick.choice([self._generate, self._generate, self._completion, self._chat, self._scored])
        path, body = make(pick)
        ask = Ask(name, path, body)
        return replace(ask, leaving=self._leaving(pick, ask)) if pick.random() < self.leaving else ask

    def _generate(self, pick: random.Random) -> tuple[str, dict[str, Any]]:
        body = {"prompt": self._prompt(pick), "max_new_tokens": self._length(pick), **self._common(pick)}
        return "/v1/generate", body | self._selection(pick)

    def _completion(self, pick: random.Random) -> tuple[str, dict[str, Any]]:
        prompts = [self._prompt(pick) for _ in range(pick.choice([1, 1, 3]))]
        body = {"prompt": prompts, "max_tokens": self._length(pick), **self._common(pick)}
        return "/v1/completions", body | pick.choice([self._selection, self._model])(pick)

    def _chat(self, pick: random.Random) -> tuple[str, dict[str, Any]]:
        messages = [{"role": "user", "content": self._prompt(pick)}]
        body = {"messages": messages, "max_tokens": self._length(pick), **self._common(pick)}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        return "/v1/chat/completions", body | pick.choice([self._selection, self._model])(pick)

    def _scored(self, pick: random.Random) -> tuple[str, dict[str, Any]]:
        """A prompt whose own log-probabilities are asked for, with an answer or without."""
        body = {"prompt": self._prompt(pick), "echo": True, "logprobs": pick.choice([0, 3])}
        return "/v1/completions", body | {"max_tokens": pick.choice([0, 4])} | self._selection(pick)

    def _common(self, pick: random.Random) -> dict[str, Any]:
        fields: dict[str, Any] = {"stream": pick.random() < 0.5, "n": pick.choice([1, 1, 1, 3])}
        fields |= pick.choice([{"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": pick.randrange(1 << 30)}])
        if pick.random() < 0.3:
            fields["stop"] = pick.sample(_LETTERS, 3)
        return fields | {"ignore_eos": True}

    def _selection(self, pick: random.Random) -> dict[str, Any]:
        one, other = pick.sample(self.adapters, 2)
        blend = [{"name": one, "weight": 0.6}, {"name": other, "weight": 0.4}]
        fields = [{}, {"adapter": "base"}, {"adapter": one}, {"adapter": other}, {"adapters": blend}]
        return pick.choice(fields) | pick.choice([{}, {}, {}, {"mode": "merge"}])

    def _model(self, pick: random.Random) -> dict[str, Any]:
        one, other = pick.sample(self.adapters, 2)
        return {"model": pick.choice([one, f"{one}:0.7+{other}:-0.3"])}

    def _prompt(self, pick: random.Random) -> str:
        text = "".join(pick.choices(_LETTERS, k=pick.choice([1, 8, 40, self.longest])))
        return (_SHARED + text)[: self.longest] if pick.random() < 0.3 else text

    def _length(self, pick: random.Random) -> int:
        return pick.choice([1, self.tokens // 2 or 1, self.tokens])

    def _leaving(self, pick: random.Random, ask: Ask) -> Leaving:
        """Before the first byte, in the middle, or after the last token and before the end is read."""
        soon = Leaving(seconds=pick.choice([0.0, 0.001, 0.01, 0.05, 0.2]))
        return Leaving(events=pick.randint(1, self.tokens)) if ask.streams and pick.random() < 0.6 else soon


def distinct_adapters(count: int) -> Sequence[str]:
    return tuple(f"adapter-{i}" for i in range(count))
