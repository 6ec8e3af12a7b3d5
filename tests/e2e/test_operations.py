"""What a real server tells of itself: metrics that move because of what is done, and one log line a request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.server import ROOT, Server

PROMPT = "a prompt that is long enough to be kept in the prefix cache, in whole blocks"
TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and two adapters for it."""
    folder = tmp_path_factory.mktemp("operations")
    model = tiny_model("llama")
    save_model(model, folder / "base")
    for seed, name in enumerate(("sql", "style")):
        make_adapter(model, AdapterSpec(seed=seed), folder / name)
    return folder


@pytest.fixture
def server(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Writes JSON logs; a test's parameters are further arguments."""
    arguments = ("--model", str(folder / "base"), "--log-format", "json", *getattr(request, "param", ()))
    environ = {"VBLORA_ADAPTER": f"sql={folder / 'sql'},style={folder / 'style'}"}
    with Server("serve", *arguments, data_dir=tmp_path / "data", environ=environ) as server:
        yield server


def samples(server: Server) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for name, labels, value, *_ in family.samples:
            found[name + "".join(f"{{{label}={labels[label]}}}" for label in sorted(labels))] = value
    return found


def generation_lines(server: Server) -> list[dict[str, Any]]:
    """Of a server that has ended."""
    lines = [json.loads(line) for line in server.log if line.startswith("{")]
    return [line for line in lines if line["logger"] == "vblora.access" and line["path"] == "/v1/generate"]


def generate(server: Server, **fields: Any) -> dict[str, Any]:
    return server.generate(PROMPT, **{"max_new_tokens": TOKENS, "ignore_eos": True, **fields})


def test_metrics_move_with_what_is_done(server: Server) -> None:
    before = samples(server)
    generate(server, adapter="sql")
    generate(server, adapter="sql", n=2)
    generate(server, adapter="style", mode="merge")
    generate(server, adapter="base")
    generate(server, adapters=[{"name": "sql", "weight": 0.5}, {"name": "style", "weight": 0.5}])
    after = samples(server)

    def rise(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    for adapter, times in {"sql": 2, "style": 1, "base": 1, "blend": 1}.items():
        assert rise(f"vblora_generations_total{{adapter={adapter}}}") == times
    assert rise("vblora_finished_choices_total{reason=length}") == 6
    assert rise("vblora_time_to_first_token_seconds_count") == 5
    assert rise("vblora_inter_token_latency_seconds_count") == 6 * (TOKENS - 1)
    assert rise("vblora_generation_seconds_count") == rise("vblora_queue_seconds_count") == 5
    assert rise("vblora_completion_tokens_total") == 6 * TOKENS
    assert rise("vblora_prompt_tokens_total") + rise("vblora_prefix_tokens_total") == 6 * len(PROMPT)
    assert rise("vblora_prefix_tokens_total") > 0
    assert (rise("vblora_adapter_misses_total"), rise("vblora_adapter_hits_total")) == (2, 3)
    assert rise("vblora_adapter_composes_total") == after["vblora_adapter_versions{state=ready}"] == 2
    assert rise("vblora_adapter_compose_seconds_total") > 0
    assert (rise("vblora_folds_total"), rise("vblora_restores_total")) == (1, 1)
    assert rise("vblora_fold_seconds_total") > 0
    assert after["vblora_adapter_resident_bytes{kind=factors}"] > 0
    assert 0 <= after["vblora_kv_bytes"] < after["vblora_kv_budget_bytes"] == 2 << 30
    assert after["vblora_time_to_first_token_seconds_sum"] <= after["vblora_generation_seconds_sum"]


def test_one_line_for_every_request_and_no_word_of_its_prompt(server: Server) -> None:
    def ask(i: int) -> str:
        body = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": TOKENS, "stream": i % 2 == 0, "ignore_eos": True}
        return server.http.post("/v1/generate", json=body, headers={"x-request-id": f"r{i}"}).text

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(12)))
    assert all(answers)
    server.stop()
    lines = generation_lines(server)
    assert sorted(line["request_id"] for line in lines) == sorted(f"r{i}" for i in range(12))
    assert all(line["completion_tokens"] == TOKENS and line["finish_reasons"] == "length" for line in lines)
    assert all(0 <= line["queue_s"] <= line["first_token_s"] <= line["duration_s"] for line in lines)
    assert any(line["cached_tokens"] for line in lines)
    assert "long enough" not in "".join(server.log)
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*)\n```", page)
    assert list(json.loads(example)) == list(lines[0]), "the documented line looks as real ones do"


@pytest.mark.parametrize("server", [("--log-prompts",)], indirect=True)
def test_prompts_and_outputs_are_logged_when_asked(server: Server) -> None:
    text = generate(server, adapter="sql")["choices"][0]["text"]
    server.stop()
    (line,) = generation_lines(server)
    assert (line["prompt"], line["output"]) == (PROMPT, text)
