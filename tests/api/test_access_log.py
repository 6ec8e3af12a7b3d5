"""The access log's line for a request that generates, and what such a request moves in the metrics."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from service.api.activity import Activity
from service.api.keys import ApiKey
from service.api.observation import Observation
from service.engine.errors import Overloaded
from service.engine.events import FailedEvent, FinishedEvent, FinishReason, Timing, TokenEvent, Usage
from service.engine.selection import SelectedAdapter, Selection
from service.engine.sequence import GenerationRequest, SamplingParams
from service.logs import OWN_LOGGERS, setup_logging
from tests.api.asgi import WAIT_S, exchange
from tests.api.conftest import Server
from tests.fakes import Failure, FakeMetrics

PROMPT = "the prompt\nnobody sees"
LATER = time.monotonic() + 1000  # than any observation here begins


@pytest.fixture
def logged() -> Iterator[Callable[..., io.StringIO]]:
    """Sets the logging up as the server does; returns what is written from then on."""
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in ("", *OWN_LOGGERS)}

    def setup(format: str, **options: Any) -> io.StringIO:
        stream = io.StringIO()
        setup_logging(format=format, stream=stream, **options)
        return stream

    yield setup
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)


def access_lines(stream: io.StringIO) -> list[str]:
    return [line for line in stream.getvalue().splitlines() if "vblora.access" in line]


def the_line(stream: io.StringIO) -> dict[str, Any]:
    (line,) = access_lines(stream)
    fields: dict[str, Any] = json.loads(line)
    return fields


def test_whose_request_it_was_is_told_of_every_one(
    make_server: Callable[..., Server], logged: Callable[..., io.StringIO]
) -> None:
    server = make_server([ApiKey.of("one", tenant="acme", label="ci"), ApiKey.of("two", label="ci")])
    for key, tenant in (("one", "acme"), ("two", None)):
        for path in ("/v1/adapters/none", "/v1/generate"):
            written = logged("json")
            server.client.request(
                "POST" if path == "/v1/generate" else "DELETE",
                path,
                headers={"authorization": f"Bearer {key}"},
                json={"prompt": "hi"},
            )
            line = the_line(written)
            assert (line["path"], line["key"], line.get("tenant")) == (path, "ci", tenant)


@pytest.mark.parametrize("stream", [True, False])
def test_one_line_says_what_ran_and_how_long_it_took(
    server: Server, logged: Callable[..., io.StringIO], stream: bool
) -> None:
    server.upload("sql")
    written = logged("json")
    body = {"prompt": PROMPT, "adapter": "sql", "max_new_tokens": 5, "n": 2, "stream": stream, "mode": "merge"}
    response = server.client.post("/v1/generate", json=body, headers={"x-request-id": "mine"})
    line = the_line(written)
    assert line.pop("time").endswith("Z")
    assert line.pop("first_token_s") >= 0
    assert line.pop("duration_s") > 0
    generation_id = line.pop("generation_id")
    assert generation_id.startswith("gen-")
    assert generation_id in response.text
    assert line == {
        "level": "info",
        "logger": "vblora.access",
        "message": "request",
        "request_id": "mine",
        "method": "POST",
        "path": "/v1/generate",
        "status": 200,
        "selection": "sql",
        "digest": server.digest("sql"),
        "mode": "merge",
        "n": 2,
        "stream": stream,
        "prompt_tokens": len(PROMPT),
        "cached_tokens": 0,
        "completion_tokens": 10,
        "finish_reasons": "length,length",
        "queue_s": 0.1,
        "total_s": 0.3,
    }


def test_as_text_it_is_one_line_too(server: Server, logged: Callable[..., io.StringIO]) -> None:
    server.upload("sql")
    server.upload("style", "two")
    written = logged("text")
    adapters = [{"name": "sql", "weight": 0.7}, {"name": "style", "weight": 0.3}]
    server.generate(adapters=adapters, prompt=PROMPT)
    (line,) = access_lines(written)
    assert " selection=sql:0.7+style:0.3 " in line
    assert f" digest={server.digest('sql')}:0.7,{server.digest('style')}:0.3 " in line
    assert " finish_reasons=length " in line


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize("stream", [True, False])
def test_neither_prompt_nor_output_is_logged_unless_asked(
    make_server: Callable[..., Server], logged: Callable[..., io.StringIO], format: str, stream: bool
) -> None:
    output = "base;base;"
    for asked in (False, True):
        server = make_server(log_prompts=asked)
        written = logged(format, prompts=asked)
        server.generate(prompt=PROMPT, adapter="base", max_new_tokens=len(output), stream=stream)
        (line,) = access_lines(written)
        assert ("nobody sees" in written.getvalue()) is asked
        assert (output in written.getvalue()) is asked
        if asked and format == "json":
            assert (json.loads(line)["prompt"], json.loads(line)["output"]) == (PROMPT, output)


def test_a_prompt_of_token_ids_is_logged_as_text_and_several_outputs_as_a_list(
    make_server: Callable[..., Server], logged: Callable[..., io.StringIO]
) -> None:
    written = logged("json", prompts=True)
    make_server(log_prompts=True).generate(prompt=[104, 105], n=2, max_new_tokens=4)
    assert the_line(written)["prompt"] == "hi"
    assert the_line(written)["output"] == ["base", "base"]


@pytest.mark.parametrize("stream", [True, False])
def test_several_prompts_are_one_line(
    make_server: Callable[..., Server], logged: Callable[..., io.StringIO], stream: bool
) -> None:
    server = make_server(log_prompts=True)
    written = logged("json", prompts=True)
    body = {"prompt": ["one", "three"], "max_tokens": 4, "stream": stream, "n": 2}
    response = server.client.post("/v1/completions", json=body)
    line = the_line(written)
    assert f'"id":"{line["generation_id"]}"' in response.text
    assert (line["path"], line["n"], line["stream"]) == ("/v1/completions", 2, stream)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (8, 16)
    assert line["finish_reasons"] == "length,length,length,length"
    assert (line["prompt"], line["output"]) == (["one", "three"], ["base"] * 4)
    assert server.metrics.generations == [("base", "")] * 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_chat_is_logged_like_all_else(
    make_server: Callable[..., Server], logged: Callable[..., io.StringIO], stream: bool
) -> None:
    for asked in (True, False):
        server = make_server(log_prompts=asked)
        written = logged("json", prompts=asked)
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, "stream": stream}
        assert server.client.post("/v1/chat/completions", json=body).status_code == 200
        line = the_line(written)
        assert (line["path"], line["selection"], line["completion_tokens"]) == ("/v1/chat/completions", "base", 4)
        assert line.get("output") == ("base" if asked else None)
        assert ("nobody sees" in written.getvalue()) is asked


def test_a_request_that_generates_nothing_has_no_such_fields(
    server: Server, logged: Callable[..., io.StringIO]
) -> None:
    written = logged("json")
    server.client.get("/healthz")
    assert {"selection", "prompt_tokens", "generation_id"}.isdisjoint(the_line(written))


def test_a_refused_request_says_what_it_asked_for_and_counts_as_no_generation(
    server: Server, logged: Callable[..., io.StringIO]
) -> None:
    server.engine.refusal = Overloaded("full", retry_after_s=1)
    written = logged("json")
    server.generate(adapter="base")
    line = the_line(written)
    assert (line["status"], line["code"], line["selection"]) == (429, "overloaded", "base")
    assert line["completion_tokens"] == 0
    assert "finish_reasons" not in line
    assert server.metrics.generations == []
    assert server.metrics.finished == {}


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_is_one_line_with_its_code(server: Server, logged: Callable[..., io.StringIO], stream: bool) -> None:
    server.engine.failure = Failure("request_timeout", "too late", after=2)
    written = logged("json")
    server.generate(stream=stream, n=2)
    line = the_line(written)
    assert (line["code"], line["completion_tokens"]) == ("request_timeout", 4)
    assert not {"total_s", "finish_reasons", "queue_s"} & set(line)
    assert server.metrics.finished == {"failed": 2}
    assert server.metrics.observed == {"first_token": 1, "inter_token": 2}


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_one_line(
    server: Server, logged: Callable[..., io.StringIO], stream: bool
) -> None:
    server.engine.gate.clear()
    written = logged("json")
    body = {"prompt": "hi", "stream": stream}
    async with exchange(server.app, "POST", "/v1/generate", body=body) as client:
        await asyncio.to_thread(server.engine.submitted.wait, WAIT_S)
        client.leave()
        await client.end()
    line = the_line(written)
    assert (line["status"], line["code"], line["completion_tokens"]) == (499, "client_disconnected", 0)


@pytest.mark.anyio
async def test_a_client_that_leaves_in_the_middle_is_told_of_as_far_as_it_came(
    server: Server, logged: Callable[..., io.StringIO]
) -> None:
    server.engine.hold_after = 1
    written = logged("json")
    async with exchange(server.app, "POST", "/v1/generate", body={"prompt": "hi", "stream": True}) as client:
        assert await client.status() == 200
        await client.text()
        client.leave()
        await client.end()
    line = the_line(written)
    assert (line["status"], line["code"], line["completion_tokens"]) == (200, "client_disconnected", 1)


@pytest.mark.parametrize("stream", [True, False])
def test_what_a_request_moves_in_the_metrics(server: Server, stream: bool) -> None:
    server.generate(adapter="base", n=2, max_new_tokens=5, stream=stream)
    assert server.metrics.generations == [("base", "")]
    assert server.metrics.finished == {"length": 2}
    assert server.metrics.observed == {"first_token": 1, "inter_token": 8, "generation": 1}


# --- the observation itself, on a clock of its own ------------------------------------------------


def observed(metrics: FakeMetrics, n: int = 1, names: Sequence[str] = ("r",)) -> Observation:
    selection = Selection((SelectedAdapter("sql", "sha256:sql", 2.0),))
    requests = [GenerationRequest(each, (1, 2, 3), SamplingParams(), selection, n=n, tenant="acme") for each in names]
    return Observation("answer", requests, metrics, Activity(), stream=False)


class Recorded(FakeMetrics):
    """Remembers the times too."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps: list[float] = []

    def observe_inter_token(self, seconds: float) -> None:
        self.gaps.append(round(seconds, 9))


def token(choice: int, *ids: int, reason: FinishReason | None = None, name: str = "r") -> TokenEvent:
    return TokenEvent(name, choice, ids, "x", finish_reason=reason)


def test_gaps_are_between_tokens_of_one_choice() -> None:
    metrics = Recorded()
    observation = observed(metrics, n=2, names=("r", "s"))
    for name, choice, moment in [("r", 0, 1.0), ("r", 1, 1.5), ("s", 0, 2.0), ("r", 0, 3.0), ("r", 1, 7.5)]:
        observation.saw(token(choice, 5, name=name), LATER + moment)
    observation.saw(token(0, reason=FinishReason.CANCELLED), LATER + 9)
    assert metrics.gaps == [2.0, 6.0], "an end without a token is no token"
    assert metrics.observed["first_token"] == 2
    assert observation.fields()["completion_tokens"] == 5


def test_a_cancelled_request_is_no_sample_of_how_long_generations_take() -> None:
    for reason, samples in ((FinishReason.CANCELLED, 0), (FinishReason.STOP, 1)):
        metrics = FakeMetrics()
        observation = observed(metrics)
        observation.saw(token(0, 5, reason=reason), LATER)
        observation.saw(FinishedEvent("r", Usage(3, 1), Timing(0.1, 0.2, 0.3), "switch"), LATER)
        assert metrics.observed["generation"] == samples
        assert metrics.finished == {reason: 1}


def test_choices_that_ended_before_a_failure_did_not_fail() -> None:
    metrics = FakeMetrics()
    observation = observed(metrics, n=3)
    observation.saw(token(1, 5, reason=FinishReason.STOP), LATER)
    observation.saw(FailedEvent("r", "internal_error", "broken"), LATER)
    assert metrics.finished == {"stop": 1, "failed": 2}


def test_of_several_prompts_tokens_are_summed_and_the_longest_times_count() -> None:
    observation = observed(FakeMetrics(), names=("one", "other"))
    for name, seconds, cached in (("one", 1.0, 0), ("other", 2.0, 2)):
        observation.saw(token(0, 5, reason=FinishReason.STOP, name=name), LATER + seconds)
        timing = Timing(seconds / 4, seconds / 2, seconds)
        observation.saw(FinishedEvent(name, Usage(3, 1, cached), timing, "switch"), LATER + seconds)
    fields = observation.fields()
    assert fields.pop("first_token_s") >= LATER - time.monotonic()
    assert fields == {
        "generation_id": "answer",
        "selection": "sql:2",
        "digest": "sha256:sql:2",
        "mode": "switch",
        "n": 1,
        "stream": False,
        "prompt_tokens": 6,
        "cached_tokens": 2,
        "completion_tokens": 2,
        "finish_reasons": "stop,stop",
        "queue_s": 0.5,
        "total_s": 2.0,
        "prompt": None,
        "output": None,
    }
