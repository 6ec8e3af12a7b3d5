"""What the demo shows, done over HTTP as any client would: uploads, counts, one prompt answered by everyone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.commands.progress import counting
from service.demo.styles import PROMPTS, STYLES

NEW_TOKENS = 48
OWN_STYLE_AT_LEAST = 0.8
OTHER_STYLES_AT_MOST = 0.2

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one selection made of a prompt. `scores` says how much of each style is in it, in [0, 1]."""

    who: str
    text: str
    scores: Mapping[str, float]


class Tour:
    """One walk through a running server with the demo's adapters."""

    def __init__(self, client: httpx.Client, adapters: Path, blend: Sequence[Body], console: Console) -> None:
        self._http = client
        self._adapters = adapters
        self._blend = list(blend)
        self._console = console

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self._adapters.iterdir() if path.is_dir())

    def upload(self) -> None:
        """Uploads every adapter; one that is there already gets a new version only if its files differ."""
        for name in self.names:
            folder = self._adapters / name
            files = {
                "config": (folder / "adapter_config.json").read_bytes(),
                "weights": (folder / "adapter_model.safetensors").read_bytes(),
            }
            begun = time.monotonic()
            response = self._http.post("/v1/adapters", params={"replace": "true"}, data={"name": name}, files=files)
            took = time.monotonic() - begun
            record = _checked(response)
            self._console.print(f"uploaded {name}: {record['file_bytes']:,} bytes in {1000 * took:.0f} ms")

    def show_counts(self) -> None:
        """Every adapter's size and parameter count, beside LoRA of the same rank on the same layers."""
        table = Table("adapter", "r", "bank", "top-k", "bytes", "parameters", "LoRA's", "share")
        for name in self.names:
            count = _checked(self._http.get(f"/v1/adapters/{name}/parameters"))
            table.add_row(
                name,
                str(count["r"]),
                f"{count['num_vectors']}×{count['vector_length']}",
                str(count["topk"]),
                f"{count['file_bytes']:,}",
                f"{count['vblora_params']:,}",
                f"{count['lora_params']:,}",
                f"{count['vblora_params'] / count['lora_params']:.0%}",
            )
        self._console.print(table)

    def answers(self, prompt: str) -> Iterator[Answer]:
        """The prompt continued by the base, by each adapter, and by the blend."""
        yield self._answer("base", prompt, {"adapter": "base"})
        for name in self.names:
            yield self._answer(name, prompt, {"adapter": name})
        if self._blend:
            yield self._answer(self.blend_name, prompt, {"adapters": self._blend})

    @property
    def blend_name(self) -> str:
        return "+".join(f"{part['name']}:{part['weight']:g}" for part in self._blend)

    def show_answers(self, prompt: str) -> list[Answer]:
        """Prints and returns the answers to one prompt."""
        table = Table("who", "answer", "styles", title=f"“{prompt}”, greedy", show_lines=True)
        answers = []
        with counting("Answering", len(self.names) + 1 + bool(self._blend)) as advance:
            for answer in self.answers(prompt):
                answers.append(answer)
                advance(1)
        for answer in answers:
            scores = {style: score for style, score in answer.scores.items() if score >= 0.1}
            shown = "\n".join(f"{style} {score:.2f}" for style, score in scores.items()) or "none"
            table.add_row(answer.who, Text(answer.text), shown)
        self._console.print(table)
        return answers

    def faults(self, answers: Sequence[Answer]) -> list[str]:
        """Where an answer is not in its own style, or is in another's; empty if the demo shows what it should."""
        faults = []
        for answer in answers:
            for style, score in answer.scores.items():
                if answer.who == style and score < OWN_STYLE_AT_LEAST:
                    faults.append(f"{answer.who} scores {score:.2f} on its own style")
                elif answer.who in ("base", *self.names) and answer.who != style and score > OTHER_STYLES_AT_MOST:
                    faults.append(f"{answer.who} scores {score:.2f} on {style}")
        return faults

    def show_commands(self, url: str) -> None:
        """What to try next, ready to be pasted."""
        name = self.names[0]
        commands = (
            _generate(url, {"prompt": PROMPTS[0], "adapter": name, "temperature": 0}),
            _generate(url, {"prompt": PROMPTS[1], "adapters": self._blend, "stream": True}),
            f"curl {url}/v1/adapters/{name}/parameters",
            f"curl -X POST {url}/v1/adapters/{name}/activate",
        )
        self._console.print(f"\nThe server goes on at {url} until Ctrl-C; its API page is {url}/docs. Try:")
        for command in commands:
            self._console.print(f"  {command}", soft_wrap=True)

    def _answer(self, who: str, prompt: str, selection: Body) -> Answer:
        body = {"prompt": prompt, "temperature": 0, "max_new_tokens": NEW_TOKENS, **selection}
        text = _checked(self._http.post("/v1/generate", json=body))["choices"][0]["text"]
        return Answer(who, text, {name: style.score(text) for name, style in STYLES.items()})


def _checked(response: httpx.Response) -> dict[str, Any]:
    """The JSON of a good response; the server's own words if it is not."""
    if response.is_error:
        raise RuntimeError(f"{response.request.url} answered {response.status_code}: {response.text}")
    body: dict[str, Any] = response.json()
    return body


def _generate(url: str, body: Body) -> str:
    return f"curl {url}/v1/generate -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
