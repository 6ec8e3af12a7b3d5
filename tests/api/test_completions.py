"""POST /v1/completions: what it takes, what the engine is asked, what it answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from service.api.completion_writer import CompletionWriter
from service.api.openai import Envelope
from service.api.receipt import ReceiptWriter
from service.api.schemas.completions import CompletionRequest
from service.engine.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from service.engine.events import TokenLogprob
from service.engine.selection import Mode, Selection
from service.engine.sequence import GenerationRequest, SamplingParams
from tests.api.conftest import ALIAS, BASE, Server, error_of
from tests.factories import BOS_ID
from tests.fakes import Failure, fake_text

HI = [{"role": "user", "content": "hi"}]
NOTHING_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


def complete(server: Server, **fields: Any) -> httpx.Response:
    return server.client.post("/v1/completions", json={"prompt": "hi", **fields})


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which ended as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *frames, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def test_answers_as_openai_does(server: Server) -> None:
    body = complete(server, model=BASE, max_tokens=8).json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": BASE,
        "system_fingerprint": "vblora-0123456789abcdef",
        "choices": [{"index": 0, "text": "base;bas", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10, **NOTHING_CACHED},
    }


def test_model_selects(server: Server) -> None:
    server.upload("sql", "one")
    server.upload("style", "two")
    sql, style = server.digest("sql"), server.digest("style")

    def ran(**fields: Any) -> tuple[str, str, str]:
        response = complete(server, **fields)
        assert response.status_code == 200, response.text
        body = response.json()
        return body["model"], response.headers["x-adapter-digest"], body["system_fingerprint"].removeprefix("vblora-")

    base = "0123456789abcdef"
    of_sql = f"{base}-{sql.removeprefix('sha256:')[:12]}"
    assert ran(model=BASE) == (BASE, "base", base)
    assert ran(model=ALIAS) == (ALIAS, "base", base)
    assert ran() == (BASE, "base", base)
    assert ran(model="sql") == ("sql", sql, of_sql)
    assert ran(model=f"sql@{sql[:15]}") == (f"sql@{sql[:15]}", sql, of_sql)
    assert ran(adapter="sql") == ("sql", sql, of_sql)
    assert ran(model=BASE, adapter="sql") == (BASE, sql, of_sql)
    model, header, fingerprint = ran(model="sql:0.7+style:-0.5")
    assert (model, header) == ("sql:0.7+style:-0.5", f"{sql}:0.7,{style}:-0.5")
    assert fingerprint not in (base, of_sql)
    assert ran(adapters=[{"name": "sql", "weight": 0.7}, {"name": "style", "weight": -0.5}])[1:] == (
        header,
        fingerprint,
    )
    assert ran(model="sql:0.5")[2] not in (of_sql, fingerprint)
    server.upload("active", "logits", activate="true")
    assert ran()[0] == "active"
    assert ran(model=BASE)[1] == "base"
    complete(server, model="sql", mode="merge")
    assert server.engine.requests[-1].selection.mode is Mode.MERGE


@pytest.mark.parametrize("model", ["nobody", "sql:0.5+nobody", "no such", "org/other", ""])
def test_an_unknown_model_is_never_answered_by_the_base(server: Server, model: str) -> None:
    server.upload("sql")
    error_of(complete(server, model=model), 404, "adapter_not_found")
    assert server.engine.requests == []


@pytest.mark.parametrize("model", ["sql:0.5 + sql:0.5", "sql:half", "sql+", "sql:nan"])
def test_a_blend_that_is_written_wrongly_is_said_to_be(server: Server, model: str) -> None:
    server.upload("sql")
    error = error_of(complete(server, model=model), 404, "adapter_not_found")
    assert "a:0.7+b:0.3 without spaces" in error["message"]


def test_model_and_adapter_that_disagree_are_refused(server: Server) -> None:
    server.upload("sql", "one")
    server.upload("style", "two")
    error = error_of(complete(server, model="sql", adapter="style"), 400, "invalid_request")
    assert error["param"] == "model"


def test_every_sampling_field_reaches_the_engine(server: Server) -> None:
    complete(
        server,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={"65": -100, "7": 1.5},
        seed=-3,
        stop=["x", "yz"],
        stop_token_ids=[3],
        ignore_eos=True,
        n=2,
        logprobs=4,
        timeout_s=5,
        user="someone",
        store=True,
        metadata={"a": "b"},
    )
    (request,) = server.engine.requests
    assert request.params == SamplingParams(
        max_new_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias=((7, 1.5), (65, -100.0)),
        seed=-3,
        stop=("x", "yz"),
        stop_token_ids=frozenset({3}),
        ignore_eos=True,
        logprobs=4,
    )
    assert (request.n, request.timeout_s) == (2, 5)


def test_null_means_the_default(server: Server) -> None:
    names = set(CompletionRequest.model_fields) - {"prompt"}
    assert complete(server, **dict.fromkeys(names)).status_code == 200
    assert complete(server, top_k=-1).status_code == 200
    assert [request.params for request in server.engine.requests] == [SamplingParams(max_new_tokens=16)] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 3}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"suffix": "}"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"tokens": True}}, "stream_options.tokens"),
        ({"tempurature": 1}, "tempurature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 0}, "n"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": ["x", 1]}, "prompt"),
        ({"prompt": [[1], "x"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1], [True]]}, "prompt"),
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "("}, "guided_regex"),
    ],
)
def test_what_is_refused_names_the_field(server: Server, fields: dict[str, Any], param: str) -> None:
    content = json.dumps({"prompt": "hi", **fields})
    response = server.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    error = error_of(response, 400, "invalid_request")
    assert error["param"] == param, error
    assert param in error["message"], error
    assert server.engine.requests == []


def test_best_of_that_asks_for_nothing_more_is_taken(server: Server) -> None:
    assert complete(server, n=2, best_of=2).status_code == 200
    assert complete(server, best_of=1, suffix="").status_code == 200


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_of_every_kind(server: Server) -> None:
    def prompts(prompt: Any) -> list[tuple[int, ...]]:
        server.engine.requests.clear()
        assert complete(server, prompt=prompt).status_code == 200
        return sorted(request.prompt_ids for request in server.engine.requests)

    assert prompts("ab") == [(97, 98)]
    assert prompts([97, 98]) == [(97, 98)]
    assert prompts(["ab", "c"]) == [(97, 98), (99,)]
    assert prompts([[97, 98], [99]]) == [(97, 98), (99,)]
    assert prompts("") == prompts([]) == [(BOS_ID,)]
    assert prompts(["", "c"]) == [(99,), (BOS_ID,)]


def test_a_list_of_prompts_is_answered_in_its_order(server: Server) -> None:
    body = complete(server, prompt=["abc", "d"], n=2, max_tokens=4, echo=True).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "abcbase"),
        (1, "abcbase"),
        (2, "dbase"),
        (3, "dbase"),
    ]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 16, "total_tokens": 20, **NOTHING_CACHED}


def test_a_list_of_prompts_streams(server: Server) -> None:
    response = complete(
        server,
        prompt=["abc", "d"],
        n=2,
        max_tokens=4,
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    *events, last = events_of(response)
    texts = [""] * 4
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        assert event["usage"] is None
    assert texts == ["abcbase", "abcbase", "dbase", "dbase"]
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 16, "total_tokens": 20, **NOTHING_CACHED}


def test_when_one_of_several_prompts_fails_all_do(server: Server) -> None:
    server.engine.failure = Failure("internal_error", "the engine failed", after=2)
    error_of(complete(server, prompt=["abc", "d"]), 500, "internal_error")


def test_when_the_engine_refuses_one_of_several_prompts_none_is_answered(server: Server) -> None:
    server.engine.refusal = Overloaded("full", retry_after_s=1)
    error_of(complete(server, prompt=["abc", "d", "e"]), 429, "overloaded")
    assert server.metrics.generations == []


@pytest.mark.parametrize(
    ("path", "body", "param", "named"),
    [
        ("/v1/completions", {"prompt": "hi"}, "prompt", "2 of the prompt and 300 more (max_tokens)"),
        ("/v1/chat/completions", {"messages": HI}, "messages", "2 of the messages and 300 more (max_tokens)"),
        ("/generate", {"inputs": "hi"}, "inputs", "2 of the inputs and 300 more (parameters.max_new_tokens)"),
    ],
)
def test_what_does_not_fit_is_told_in_the_clients_words(
    server: Server, path: str, body: dict[str, Any], param: str, named: str
) -> None:
    server.engine.refusal = ContextLengthExceeded(prompt_tokens=2, max_new_tokens=300, context=256)
    error = error_of(server.client.post(path, json=body), 400, "context_length_exceeded")
    assert error["param"] == param
    assert named in error["message"]
    server.engine.refusal = InvalidRequest("takes more memory than --kv-memory allows", param="prompt")
    assert error_of(server.client.post(path, json=body), 400, "invalid_request")["param"] == param


@pytest.mark.parametrize("schema", [{}, {"schema": None}])
def test_a_response_format_without_a_schema_is_any_object(server: Server, schema: dict[str, Any]) -> None:
    complete(server, response_format={"type": "json_schema", "json_schema": {"name": "any", **schema}})
    assert server.engine.requests[-1].grammar is server.state.guidance.json_object()


# --- echo and log-probabilities -------------------------------------------------------------------


def test_logprobs_in_openais_columns(server: Server) -> None:
    (choice,) = complete(server, max_tokens=2, logprobs=2).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["b", "a"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"a": -1.0, "b": -2.0}, {"a": -1.0, "b": -2.0}],
        "text_offset": [0, 1],
    }
    (choice,) = complete(server, max_tokens=2, logprobs=0).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-0.5, -9999.0]
    assert choice["logprobs"]["top_logprobs"] is None


def test_echo_scores_the_prompt(server: Server) -> None:
    (choice,) = complete(server, prompt="xyz", max_tokens=2, logprobs=1, echo=True).json()["choices"]
    assert choice["text"] == "xyzba"
    assert choice["logprobs"] == {
        "tokens": ["x", "y", "z", "b", "a"],
        "token_logprobs": [None, -3.0, -3.0, -0.5, -9999.0],
        "top_logprobs": [None, {"a": -1.0, "y": -3.0}, {"a": -1.0, "z": -3.0}, {"a": -1.0, "b": -0.5}, {"a": -1.0}],
        "text_offset": [0, 1, 2, 3, 4],
    }


def test_offsets_are_places_in_the_text(server: Server) -> None:
    """The tests' tokens are bytes: those of one character are all where it is."""
    (choice,) = complete(server, prompt="a€é", max_tokens=2, logprobs=0, echo=True).json()["choices"]
    assert choice["text"] == "a€éba"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 2, 2, 3, 4]


def test_the_prompt_alone(server: Server) -> None:
    body = complete(server, prompt="xyz", max_tokens=0, logprobs=0, echo=True).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("xyz", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -3.0, -3.0]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3, **NOTHING_CACHED}
    (request,) = server.engine.requests
    assert (request.params.max_new_tokens, request.params.prompt_logprobs) == (0, 0)


def test_a_stream_comes_to_the_same(server: Server) -> None:
    fields = {"prompt": ["xyz", "uv"], "max_tokens": 3, "logprobs": 2, "echo": True, "n": 2}
    whole = complete(server, **fields).json()["choices"]
    parts: dict[int, dict[str, Any]] = {}
    for event in events_of(complete(server, **fields, stream=True)):
        for choice in event["choices"]:
            into = parts.setdefault(choice["index"], choice)
            if into is not choice:
                into["text"] += choice["text"]
                into["finish_reason"] = choice["finish_reason"]
                for column, values in choice["logprobs"].items():
                    into["logprobs"][column] += values
    assert [parts[index] for index in sorted(parts)] == whole


def test_without_logprobs_the_prompt_is_not_scored(server: Server) -> None:
    complete(server, echo=True)
    assert server.engine.requests[0].params.prompt_logprobs is None


def test_tokens_that_read_alike_are_one_entry_with_the_likelier_logprob(server: Server) -> None:
    """Half characters all read as U+FFFD."""
    receipt = ReceiptWriter(server.state.base, GenerationRequest("", (), SamplingParams(), Selection()), False)
    writer = CompletionWriter(Envelope("", 0, "", ""), (), server.state.tokenizer, 2, None, receipt, False)
    token = TokenLogprob(0xC3, -2.0, ((0xC4, -0.5), (ord("a"), -1.0)))
    assert writer._top(token) == {"\ufffd": -0.5, "a": -1.0}


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_in_openais_events(server: Server) -> None:
    server.upload("sql")
    response = complete(server, model="sql", max_tokens=5, stream=True)
    events = events_of(response)
    assert response.headers["x-adapter-digest"] == server.digest("sql")
    assert len({event["id"] for event in events}) == 1
    assert {(event["object"], event["model"]) for event in events} == {("text_completion", "sql")}
    assert all("usage" not in event for event in events)
    assert "".join(event["choices"][0]["text"] for event in events) == fake_text(server.digest("sql"), 5)
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 4 + ["length"]


def test_a_failure_within_a_stream_is_an_error_event(server: Server) -> None:
    server.engine.failure = Failure("internal_error", "the engine failed", after=2)
    response = complete(server, stream=True, max_tokens=8)
    assert response.status_code == 200
    assert "event: error\ndata: " in response.text
    assert "[DONE]" not in response.text


# --- structured output ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "script"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": 1}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "integer", "maximum": 7}},
                }
            },
            "7",
        ),
        ({"guided_json": {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2}}, "[null, null]"),
        ({"guided_json": '{"enum": ["x"]}'}, '"x"'),
        ({"guided_regex": "[ab]{3}"}, "aba"),
        ({"guided_choice": ["yes", "no"]}, "no"),
    ],
)
def test_the_shape_asked_for_is_the_grammar_that_runs(server: Server, fields: dict[str, Any], script: str) -> None:
    server.engine.script = script
    body = complete(server, **fields, max_tokens=64).json()
    assert body["choices"][0]["text"] == script
    (request,) = server.engine.requests
    assert request.grammar is not None
    assert not request.grammar.start().allowed()[ord("%")]


def test_plain_text_needs_no_grammar(server: Server) -> None:
    assert complete(server, response_format={"type": "text"}).status_code == 200
    assert server.engine.requests[0].grammar is None
