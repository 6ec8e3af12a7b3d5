"""POST /v1/generate: what it takes, what the engine is asked, what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.engine.errors import ContextLengthExceeded, EngineUnavailable, InvalidRequest, Overloaded
from service.engine.selection import Mode
from service.engine.sequence import SamplingParams
from tests.api.conftest import BASE, Server, error_of
from tests.factories import BOS_ID
from tests.fakes import Failure, fake_text

TOO_LONG = ContextLengthExceeded(prompt_tokens=2, max_new_tokens=300, context=256)


def test_answers_with_the_base_model(server: Server) -> None:
    response = server.generate(max_new_tokens=8)
    assert response.status_code == 200
    assert response.headers["x-adapter-digest"] == "base"
    body = response.json()
    assert body.pop("id").startswith("gen-")
    assert body == {
        "model": BASE,
        "selection": {"adapters": [], "mode": "switch"},
        "choices": [
            {
                "index": 0,
                "text": "base;bas",
                "token_ids": list(b"base;bas"),
                "finish_reason": "length",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10},
        "timing": {"queue_s": 0.1, "first_token_s": 0.2, "total_s": 0.3},
    }


def test_answers_with_an_adapter(server: Server) -> None:
    server.upload("sql")
    response = server.generate(adapter="sql", max_new_tokens=40)
    digest = server.digest("sql")
    assert response.headers["x-adapter-digest"] == digest
    assert response.json()["choices"][0]["text"] == fake_text(digest, 40)
    adapters = [{"name": "sql", "digest": digest, "weight": 1.0}]
    assert response.json()["selection"] == {"adapters": adapters, "mode": "switch"}


def test_answers_with_a_blend(server: Server) -> None:
    server.upload("sql", "one")
    server.upload("style", "two")
    blend = [{"name": "sql", "weight": 0.75}, {"name": "style", "weight": -0.5}]
    response = server.generate(adapters=blend, mode="merge", max_new_tokens=160)
    header = f"{server.digest('sql')}:0.75,{server.digest('style')}:-0.5"
    assert response.headers["x-adapter-digest"] == header
    assert response.json()["choices"][0]["text"] == fake_text(header, 160)
    assert response.json()["selection"]["mode"] == "merge"


def test_the_active_adapter_answers_until_it_is_deactivated(server: Server) -> None:
    server.upload("sql", activate="merge")
    digest = server.digest("sql")
    assert server.generate().headers["x-adapter-digest"] == digest
    assert server.engine.requests[-1].selection.mode is Mode.MERGE
    assert server.generate(mode="switch").json()["selection"]["mode"] == "switch"
    assert server.generate(adapter="base").headers["x-adapter-digest"] == "base"
    server.client.post("/v1/adapters/sql/deactivate")
    assert server.generate().headers["x-adapter-digest"] == "base"


@pytest.mark.parametrize("name", ["nope", "nope@sha256:01234567", "no such name", "../etc", ""])
def test_an_unknown_adapter_is_never_answered_by_the_base(server: Server, name: str) -> None:
    assert "nope" in error_of(server.generate(adapter="nope"), 404, "adapter_not_found")["message"]
    error_of(server.generate(adapter=name), 404, "adapter_not_found")
    error_of(server.generate(adapters=[{"name": name}]), 404, "adapter_not_found")
    assert server.engine.requests == []


def test_every_field_reaches_the_engine(server: Server) -> None:
    fields: dict[str, Any] = {
        "max_new_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 2**63 - 1,
        "ignore_eos": True,
        "logprobs": 2,
    }
    server.generate(**fields, stop=["a", "b"], stop_token_ids=[5, 6, 5], n=2, timeout_s=9)
    request = server.engine.requests[0]
    assert request.params == SamplingParams(**fields, stop=("a", "b"), stop_token_ids=frozenset({5, 6}))
    assert (request.n, request.timeout_s, request.prompt_ids) == (2, 9, tuple(b"hi"))


def test_defaults_are_the_contracts(server: Server) -> None:
    server.client.post("/v1/generate", json={"prompt": "hi"})
    request = server.engine.requests[0]
    assert request.params == SamplingParams()
    assert (request.n, request.timeout_s) == (1, None)


def test_one_stop_string_may_stand_alone(server: Server) -> None:
    server.generate(stop="###")
    assert server.engine.requests[0].params.stop == ("###",)


def test_the_servers_timeout_bounds_the_requests(make_server: Callable[..., Server]) -> None:
    server = make_server(request_timeout_s=5.0)
    for asked, given in ((None, 5.0), (2.5, 2.5), (60, 5.0)):
        server.generate(timeout_s=asked)
        assert server.engine.requests[-1].timeout_s == given


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": "16"}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x", ""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"stream": "yes"}, "stream"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"mode": "fold"}, "mode"),
        ({"adapters": []}, "adapters"),
        ({"adapters": [{"name": "base"}]}, "adapters"),
        ({"adapters": [{"weight": 1}]}, "adapters[0].name"),
        ({"adapters": [{"name": "a", "wieght": 1}]}, "adapters[0].wieght"),
        ({"adapters": [{"name": "a"}] * 33}, "adapters"),
        ({"adapter": "a", "adapters": [{"name": "a"}]}, "adapters"),
        ({"temprature": 0.5}, "temprature"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(server: Server, fields: dict[str, Any], named: str) -> None:
    error = error_of(server.generate(**fields), 400, "invalid_request")
    assert error["type"] == "invalid_request_error"
    assert error["param"] == named
    assert named in error["message"] or named == "adapters"
    assert server.engine.requests == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_are_finite(server: Server, number: str) -> None:
    content = f'{{"prompt": "hi", "temperature": {number}}}'
    response = server.client.post("/v1/generate", content=content, headers={"content-type": "application/json"})
    assert error_of(response, 400, "invalid_request")["param"] == "temperature"


@pytest.mark.parametrize("field", ["prompt", "stop", "adapter"])
def test_half_a_surrogate_pair_is_refused(server: Server, field: str) -> None:
    content = f'{{"prompt": "hi", "{field}": "a\\ud800b"}}'
    response = server.client.post("/v1/generate", content=content, headers={"content-type": "application/json"})
    assert error_of(response, 400, "invalid_request")["param"] == field


def test_several_unknown_fields_are_all_named(server: Server) -> None:
    message = error_of(server.generate(foo=1, bar=2), 400, "invalid_request")["message"]
    assert "'foo'" in message
    assert "'bar'" in message


def test_token_ids_are_a_prompt(server: Server) -> None:
    server.generate(prompt=[1, 2, 3])
    assert server.engine.requests[0].prompt_ids == (1, 2, 3)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_the_bos_token(server: Server, prompt: Any) -> None:
    server.generate(prompt=prompt)
    assert server.engine.requests[0].prompt_ids == (BOS_ID,)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_without_bos_token_is_refused(server: Server, prompt: Any) -> None:
    class NoBos:
        bos_token_id = None

        def encode(self, text: str) -> list[int]:
            return []

    client = TestClient(create_app(replace(server.state, tokenizer=NoBos())))
    error = error_of(client.post("/v1/generate", json={"prompt": prompt}), 400, "invalid_request")
    assert error["param"] == "prompt"


def test_each_choice_is_answered(server: Server) -> None:
    body = server.generate(n=3, max_new_tokens=4).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(i, "base") for i in range(3)]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}


def test_echo_puts_the_prompt_first(server: Server) -> None:
    (choice,) = server.generate(echo=True, max_new_tokens=4, logprobs=0).json()["choices"]
    assert choice["text"] == "hibase"
    assert choice["token_ids"] == list(b"hibase")
    assert [token["token"] for token in choice["logprobs"]] == list("base")
    (choice,) = server.generate(prompt=list(b"yo"), echo=True, max_new_tokens=1).json()["choices"]
    assert choice["text"] == "yob"


def test_logprobs_name_their_tokens(server: Server) -> None:
    (choice,) = server.generate(logprobs=2, max_new_tokens=2).json()["choices"]
    top = [{"token_id": 97, "token": "a", "logprob": -1.0}, {"token_id": 98, "token": "b", "logprob": -2.0}]
    assert choice["logprobs"] == [
        {"token_id": 98, "token": "b", "logprob": -0.5, "top": top},
        {"token_id": 97, "token": "a", "logprob": -9999.0, "top": top},  # minus infinity, which JSON does not have
    ]
    (choice,) = server.generate(logprobs=0, max_new_tokens=1).json()["choices"]
    assert choice["logprobs"][0]["top"] == []


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (InvalidRequest("token 999 is not in the vocabulary", param="prompt"), 400, "invalid_request"),
        (TOO_LONG, 400, "context_length_exceeded"),
        (Overloaded("the queue is full", retry_after_s=7), 429, "overloaded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_said(
    server: Server, refusal: Exception, status: int, code: str, stream: bool
) -> None:
    server.engine.refusal = refusal
    response = server.generate(stream=stream)
    error = error_of(response, status, code)
    assert error["param"] == getattr(refusal, "param", None)
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)


def test_an_engine_that_takes_nothing_is_503(server: Server) -> None:
    server.engine.refusal = EngineUnavailable("draining")
    assert server.generate().status_code == 503


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status"),
    [("request_timeout", 408), ("overloaded", 429), ("adapter_unavailable", 503), ("internal_error", 500)],
)
def test_a_failure_before_any_output_has_its_status(server: Server, code: str, status: int, stream: bool) -> None:
    server.engine.failure = Failure(code, "it failed")
    response = server.generate(stream=stream)
    assert error_of(response, status, code)["message"] == "it failed"
    assert ("retry-after" in response.headers) == (status == 429)


def test_a_failure_halfway_is_no_partial_answer(server: Server) -> None:
    server.engine.failure = Failure("request_timeout", "it took too long", after=3)
    error_of(server.generate(), 408, "request_timeout")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/generate", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/generate", {"inputs": "hi"}),
        ("/generate_stream", {"inputs": "hi"}),
    ],
)
def test_a_full_queue_refuses_before_anything_is_done(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    assert server.client.post(path, json=body).status_code == 200
    server.engine.full = Overloaded("the queue is full", retry_after_s=3)
    monkeypatch.setattr(server.state.tokenizer, "encode", lambda text, **options: pytest.fail("it was encoded"))
    response = server.client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
    assert response.headers["retry-after"] == "3"
