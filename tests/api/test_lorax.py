"""LoRAX's routes: what of its parameters is honoured, what is refused, and its answers as its clients read them."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from service.engine.events import FinishedEvent, FinishReason, Timing, TokenEvent, TokenLogprob, Usage
from service.engine.selection import Mode
from service.engine.sequence import GenerationRequest, SamplingParams
from tests.api.conftest import ALIAS, BASE, Server, error_of
from tests.factories import EOS_ID
from tests.fakes import Failure, fake_text


def ask(server: Server, inputs: str = "hi", route: str = "/generate", **parameters: Any) -> httpx.Response:
    parameters.setdefault("max_new_tokens", 4)
    return server.client.post(route, json={"inputs": inputs, "parameters": parameters})


def params_of(server: Server, **parameters: Any) -> SamplingParams:
    response = ask(server, **parameters)
    assert response.status_code == 200, response.text
    return server.engine.requests[-1].params


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.strip().split("\n\n")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def test_answers_the_generated_text(server: Server) -> None:
    response = server.client.post("/generate", json={"inputs": "hi"})
    assert response.status_code == 200
    assert response.json() == {"generated_text": fake_text("base", 20), "details": None}
    assert response.headers["x-adapter-digest"] == "base"
    (request,) = server.engine.requests
    assert request.prompt_ids == tuple(b"hi")
    assert request.params.max_new_tokens == 20
    assert request.params.greedy
    assert request.grammar is None


def test_details(server: Server) -> None:
    response = ask(server, details=True, do_sample=True, seed=7, return_k_alternatives=2, max_new_tokens=2)
    assert response.json()["details"] == {
        "finish_reason": "length",
        "prompt_tokens": 2,
        "generated_tokens": 2,
        "skipped_tokens": 0,
        "seed": 7,
        "prefill": [],
        "tokens": [
            {
                "id": ord(text),
                "text": text,
                "logprob": logprob,
                "special": False,
                "skipped": False,
                "alternative_tokens": [
                    {"id": ord("a"), "text": "a", "logprob": -1.0},
                    {"id": ord("b"), "text": "b", "logprob": -2.0},
                ],
            }
            for text, logprob in (("b", -0.5), ("a", -9999.0))
        ],
    }


def test_details_of_the_prompt(server: Server) -> None:
    details = ask(server, "abc", decoder_input_details=True).json()["details"]
    assert details["prefill"] == [
        {"id": ord("a"), "text": "a", "logprob": None},
        {"id": ord("b"), "text": "b", "logprob": -3.0},
        {"id": ord("c"), "text": "c", "logprob": -3.0},
    ]
    assert details["seed"] is None, "greedy"
    assert [token["alternative_tokens"] for token in details["tokens"]] == [None] * 4
    assert server.engine.requests[-1].params.prompt_logprobs == 0


def test_a_random_seed_is_told(server: Server) -> None:
    seeds = [ask(server, details=True, do_sample=True).json()["details"]["seed"] for _ in range(2)]
    assert [request.params.seed for request in server.engine.requests] == seeds
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("finish", "last", "stop", "expected"),
    [
        (FinishReason.STOP, EOS_ID, [], "eos_token"),
        (FinishReason.STOP, EOS_ID, ["x"], "eos_token"),
        (FinishReason.STOP, ord("x"), ["x"], "stop_sequence"),
        (FinishReason.STOP, ord("}"), [], "eos_token"),  # a grammar's end
        (FinishReason.LENGTH, ord("x"), ["x"], "length"),
    ],
)
def test_finish_reasons(server: Server, finish: FinishReason, last: int, stop: list[str], expected: str) -> None:
    def run(request: GenerationRequest, sink: Any) -> None:
        sink(TokenEvent(request.request_id, 0, (ord("a"),), "a", (TokenLogprob(ord("a"), -1.0),)))
        sink(TokenEvent(request.request_id, 0, (last,), "", (TokenLogprob(last, -2.0),), finish))
        sink(FinishedEvent(request.request_id, Usage(2, 2), Timing(0, 0, 0), "switch"))

    server.engine._run = run  # type: ignore[method-assign]
    body = ask(server, details=True, stop=stop).json()
    assert body["details"]["finish_reason"] == expected
    assert body["details"]["tokens"][-1]["special"] is (last == EOS_ID)
    assert body["generated_text"] == "a"
    last_event = events_of(ask(server, route="/generate_stream", details=True, stop=stop))[-1]
    assert last_event["details"]["finish_reason"] == expected
    assert last_event["generated_text"] == "a"


def test_text_that_was_held_back_until_eos_is_not_lost(server: Server) -> None:
    def run(request: GenerationRequest, sink: Any) -> None:
        sink(TokenEvent(request.request_id, 0, (ord("a"),), "", (TokenLogprob(ord("a"), -1.0),)))
        sink(TokenEvent(request.request_id, 0, (EOS_ID,), "a", (TokenLogprob(EOS_ID, -2.0),), FinishReason.STOP))
        sink(FinishedEvent(request.request_id, Usage(2, 2), Timing(0, 0, 0), "switch"))

    server.engine._run = run  # type: ignore[method-assign]
    events = events_of(ask(server, route="/generate_stream", stop=["ab"]))
    assert "".join(event["token"]["text"] for event in events if not event["token"]["special"]) == "a"


def test_a_stream_has_one_event_for_each_token(server: Server) -> None:
    events = events_of(ask(server, route="/generate_stream", details=True, return_full_text=True))
    assert [event["token"]["text"] for event in events] == list("base")
    assert [event["generated_text"] for event in events] == [None, None, None, "hibase"]
    assert [event["details"] for event in events[:-1]] == [None] * 3
    assert events[-1]["details"] == {
        "finish_reason": "length",
        "prompt_tokens": 2,
        "generated_tokens": 4,
        "skipped_tokens": 0,
        "seed": None,
    }


def test_stream_in_the_body_means_the_same(server: Server) -> None:
    response = server.client.post("/generate", json={"inputs": "hi", "stream": True})
    assert "".join(event["token"]["text"] for event in events_of(response)) == fake_text("base", 20)
    assert response.headers["x-adapter-digest"] == "base"


def test_a_stream_that_fails_ends_with_an_error(server: Server) -> None:
    server.engine.failure = Failure("internal_error", "broken", after=2)
    frames = ask(server, route="/generate_stream").text.strip().split("\n\n")
    assert len(frames) == 3
    assert frames[-1].startswith("event: error\n")


def test_an_adapter_by_id(server: Server) -> None:
    server.upload("sql")
    digest = server.digest("sql")
    for adapter_id in ("sql", f"sql@{digest[:20]}"):
        response = ask(server, adapter_id=adapter_id, adapter_source="local", api_token="secret")
        assert response.headers["x-adapter-digest"] == digest
    error_of(ask(server, adapter_id="org/sql"), 404, "adapter_not_found")


def test_without_an_id_the_active_adapter_answers_as_everywhere(server: Server) -> None:
    server.upload("sql", activate="true")
    assert ask(server).headers["x-adapter-digest"] == server.digest("sql")
    for base in ("base", BASE, ALIAS, "", "__base_model__"):
        assert ask(server, adapter_id=base).headers["x-adapter-digest"] == "base"


@pytest.mark.parametrize("strategy", [None, "linear", "LINEAR"])
def test_merged_adapters_are_an_exact_blend(server: Server, strategy: str | None) -> None:
    server.upload("sql", "one")
    server.upload("style", "two")
    merged = {"ids": ["sql", "style"], "weights": [0.75, -0.5], "merge_strategy": strategy, "density": 0.5}
    header = f"{server.digest('sql')}:0.75,{server.digest('style')}:-0.5"
    assert ask(server, merged_adapters=merged).headers["x-adapter-digest"] == header
    assert server.engine.requests[-1].selection.mode is Mode.SWITCH


def test_merged_adapters_weigh_1_by_default(server: Server) -> None:
    server.upload("sql", "one")
    server.upload("style", "two")
    response = ask(server, merged_adapters={"ids": ["sql", "style"]})
    assert response.headers["x-adapter-digest"] == f"{server.digest('sql')}:1,{server.digest('style')}:1"


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
        {"temperature": 0},
        {"temperature": 0.0, "do_sample": True},
    ],
)
def test_greedy_unless_sampling_is_asked_for(server: Server, asked: dict[str, Any]) -> None:
    assert params_of(server, **asked).temperature == 0.0


@pytest.mark.parametrize(
    ("asked", "temperature"),
    [({"do_sample": True}, 1.0), ({"temperature": 0.5}, 0.5), ({"top_k": 3}, 1.0), ({"top_p": 0.5}, 1.0)],
)
def test_sampling_when_it_is_asked_for(server: Server, asked: dict[str, Any], temperature: float) -> None:
    assert params_of(server, **asked).temperature == temperature


def test_every_parameter_that_is_honoured_reaches_the_engine(server: Server) -> None:
    asked = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    more = {"presence_penalty": -0.4, "stop": ["x", "y"], "seed": 3, "ignore_eos_token": True}
    assert params_of(server, **asked, **more) == SamplingParams(
        max_new_tokens=4,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=-0.4,
        stop=("x", "y"),
        seed=3,
        ignore_eos=True,
    )


def test_truncate_keeps_the_last_tokens(server: Server) -> None:
    assert ask(server, "abcdef", truncate=2, return_full_text=True).json()["generated_text"] == "abcdefbase"
    ask(server, "abcdef", truncate=20)
    assert [request.prompt_ids for request in server.engine.requests] == [tuple(b"ef"), tuple(b"abcdef")]


def test_null_and_neutral_values_ask_for_nothing(server: Server) -> None:
    neutral = {"typical_p": 1.0, "best_of": 1, "watermark": False, "apply_chat_template": False, "details": False}
    nulls = dict.fromkeys(
        ("adapter_id", "adapter_source", "merged_adapters", "api_token", "do_sample", "temperature", "top_k", "top_p",
         "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "stop", "seed", "truncate",
         "ignore_eos_token", "return_full_text", "details", "decoder_input_details", "return_k_alternatives",
         "response_format", "best_of", "watermark", "apply_chat_template")
    )  # fmt: skip
    assert ask(server, **neutral).json() == ask(server, **nulls).json() == {"generated_text": "base", "details": None}


@pytest.mark.parametrize(
    ("response_format", "text", "allowed"),
    [
        ({"type": "json_object"}, '{"x":1}', True),
        ({"type": "json_object"}, "[]", False),
        ({"type": "json_object", "schema": {"type": "array"}}, "[]", True),
        ({"type": "json_schema", "schema": {"enum": ["a"]}}, '"b"', False),
    ],
)
def test_response_format_becomes_a_grammar(server: Server, response_format: Any, text: str, allowed: bool) -> None:
    assert ask(server, response_format=response_format).status_code == 200
    grammar = server.engine.requests[-1].grammar
    assert grammar is not None
    guide = grammar.start()
    taken = 0
    while taken < len(text) and guide.allowed()[ord(text[taken])]:
        guide.accept(ord(text[taken]))
        taken += 1
    assert (taken == len(text)) is allowed


def test_response_format_text_asks_for_nothing(server: Server) -> None:
    ask(server, response_format={"type": "text"})
    assert server.engine.requests[-1].grammar is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "typical_p": ({"typical_p": 0.9}, "parameters.typical_p"),
    "best_of": ({"best_of": 2, "do_sample": True}, "parameters.best_of"),
    "watermark": ({"watermark": True}, "parameters.watermark"),
    "apply_chat_template": ({"apply_chat_template": True}, "parameters.apply_chat_template"),
    "adapter_source": ({"adapter_id": "sql", "adapter_source": "hub"}, "parameters.adapter_source"),
    "both": ({"adapter_id": "sql", "merged_adapters": {"ids": ["sql"]}}, "parameters.merged_adapters"),
    "weights": ({"merged_adapters": {"ids": ["sql"], "weights": [1.0, 2.0]}}, "parameters.merged_adapters.weights"),
    "no ids": ({"merged_adapters": {"ids": []}}, "parameters.merged_adapters.ids"),
    "schema": ({"response_format": {"type": "json_object", "schema": {"type": "zork"}}}, "parameters.response_format"),
    "unknown": ({"num_beams": 4}, "parameters.num_beams"),
    "no tokens": ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
    "seed": ({"seed": -1}, "parameters.seed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(server: Server, case: str) -> None:
    asked, param = REFUSED[case]
    server.upload("sql")
    assert error_of(ask(server, **asked), 400, "invalid_request")["param"] == param
    assert server.engine.requests == []


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties", "magic"])
def test_other_merge_strategies_are_refused(server: Server, strategy: str) -> None:
    merged = {"ids": ["sql"], "weights": [1.0], "merge_strategy": strategy, "density": 0.5}
    error = error_of(ask(server, merged_adapters=merged), 400, "invalid_request")
    assert re.search("only the merge_strategy 'linear'", error["message"])


def test_a_stream_has_no_details_of_the_prompt(server: Server) -> None:
    error = error_of(ask(server, route="/generate_stream", decoder_input_details=True), 400, "invalid_request")
    assert error["param"] == "parameters.decoder_input_details"
