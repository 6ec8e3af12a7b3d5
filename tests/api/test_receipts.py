"""`receipt`: what a receipt says, on every route that gives one, whole and in streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from service import __version__
from service.api.receipt import hash_of_grammar, hash_of_tokens, id_of
from service.api.schemas.receipt import Receipt
from tests.api.conftest import BASE, Server, error_of
from tests.api.test_completions import events_of
from tests.factories import EOS_ID

Ask = Callable[..., httpx.Response]
PROMPTS = {"/v1/generate": b"hi", "/v1/completions": b"hi", "/v1/chat/completions": b"user: hi\nassistant: "}
ROUTES = list(PROMPTS)
NO_BASE = "base;bas"


def ask(server: Server, route: str, **fields: Any) -> httpx.Response:
    body: dict[str, Any] = {"prompt": "hi", "max_new_tokens": 8}
    if route != "/v1/generate":
        body = {"prompt": "hi", "max_tokens": 8}
    if route == "/v1/chat/completions":
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    return server.client.post(route, json={**body, **fields})


def receipt_of(response: httpx.Response) -> dict[str, Any]:
    """The receipt, once it is of the schema and its id is right."""
    body = response.json() if response.headers["content-type"] == "application/json" else events_of(response)[-1]
    receipt: dict[str, Any] = body["receipt"]
    assert set(receipt) == set(Receipt.model_fields)
    assert receipt["id"] == id_of(receipt)
    assert receipt["request_id"] == body["id"]
    return receipt


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_receipt_says_what_decided_the_answer(server: Server, route: str, stream: bool) -> None:
    server.upload("sql", "one")
    server.upload("style", "two")
    blend = [{"name": "sql", "weight": 0.75}, {"name": "style", "weight": -0.5}]
    fields = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": "#", "stop_token_ids": [9, 3], "n": 2}
    receipt = receipt_of(ask(server, route, adapters=blend, mode="merge", receipt=True, stream=stream, **fields))
    header = f"{server.digest('sql')}:0.75,{server.digest('style')}:-0.5".encode()
    assert receipt["format"] == 1
    assert receipt["created"] > 1_700_000_000
    assert receipt["versions"]["vblora_serve"] == __version__
    assert set(receipt["versions"]) == {"vblora_serve", "python", "torch", "transformers"}
    assert receipt["base"] == {
        "id": BASE,
        "fingerprint": "0123456789abcdef",
        "dtype": "float32",
        "quantization": None,
        "device": "cpu",
        "kv_backend": "slot",
    }
    assert receipt["selection"] == {
        "adapters": [
            {"name": "sql", "digest": server.digest("sql"), "weight": 0.75},
            {"name": "style", "digest": server.digest("style"), "weight": -0.5},
        ],
        "mode": "merge",
    }
    prompt = PROMPTS[route]
    assert receipt["prompt"] == {"tokens": len(prompt), "sha256": hash_of_tokens(prompt), "token_ids": None}
    assert receipt["sampling"] == {
        "max_new_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "seed": 7,
        "stop": ["#"],
        "stop_token_ids": [3, 9],
        "ignore_eos": False,
        "eos_token_ids": [EOS_ID],
        "grammar": None,
    }
    output = {"tokens": 8, "sha256": hash_of_tokens(header[:8]), "finish_reason": "length", "token_ids": None}
    assert receipt["choices"] == [{"index": index, **output} for index in range(2)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_receipt_holds_the_token_ids(server: Server, route: str, stream: bool) -> None:
    receipt = receipt_of(ask(server, route, receipt="full", stream=stream))
    assert bytes(receipt["prompt"]["token_ids"]) == PROMPTS[route]
    assert bytes(receipt["choices"][0]["token_ids"]).decode() == NO_BASE


@pytest.mark.parametrize("route", ROUTES)
def test_without_a_seed_the_server_draws_one_and_runs_with_it(server: Server, route: str) -> None:
    seeds = [receipt_of(ask(server, route, receipt=True))["sampling"]["seed"] for _ in range(2)]
    assert [request.params.seed for request in server.engine.requests] == seeds
    assert seeds[0] != seeds[1]
    assert receipt_of(ask(server, route, receipt=True, temperature=0))["sampling"]["seed"] is None
    ask(server, route)
    assert server.engine.requests[-1].params.seed is None, "the engine draws for those that need no receipt"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_nobody_gets_a_receipt_unasked(server: Server, route: str, stream: bool) -> None:
    for fields in ({}, {"receipt": False}):
        response = ask(server, route, stream=stream, **fields)
        assert "receipt" not in response.text
    assert error_of(ask(server, route, receipt="some"), 400, "invalid_request")["param"].startswith("receipt")


@pytest.mark.parametrize("route", ROUTES)
def test_a_streams_events_are_as_ever_before_the_last(server: Server, route: str) -> None:
    fields = (
        {"stream": True} if route == "/v1/generate" else {"stream": True, "stream_options": {"include_usage": True}}
    )
    plain = events_of(ask(server, route, temperature=0, **fields))
    with_receipt = events_of(ask(server, route, temperature=0, receipt=True, **fields))
    assert len(with_receipt) == len(plain)
    assert with_receipt[-1].pop("receipt")
    for event in (*plain, *with_receipt):
        event.pop("id")
        event.pop("created", None)
    assert with_receipt == plain


@pytest.mark.parametrize("route", ROUTES[1:])
def test_openais_streams_end_with_an_event_for_the_receipt(server: Server, route: str) -> None:
    *_, end, last = events_of(ask(server, route, receipt=True, stream=True))
    assert end["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == []
    assert "usage" not in last


@pytest.mark.parametrize("route", ROUTES[1:])
def test_penalties_biases_and_grammars_are_on_it(server: Server, route: str) -> None:
    server.engine.script = "yes"
    fields = {"presence_penalty": 0.5, "frequency_penalty": -0.25, "logit_bias": {"7": 2.5, "100": -1}}
    for wanted in (True, "full"):
        answer = ask(server, route, receipt=wanted, temperature=0, guided_choice=["yes", "no"], **fields)
        sampling = receipt_of(answer)["sampling"]
        assert (sampling["presence_penalty"], sampling["frequency_penalty"]) == (0.5, -0.25)
        assert sampling["logit_bias"] == {"7": 2.5, "100": -1.0}
        source = server.engine.requests[-1].grammar.source  # type: ignore[union-attr]
        assert sampling["grammar"] == {
            "sha256": hash_of_grammar(source),
            "source": source if wanted == "full" else None,
        }
    assert server.state.guidance.grammar(source).source == source


def test_the_echoed_prompt_is_not_of_the_output(server: Server) -> None:
    body = server.generate(echo=True, receipt="full", max_new_tokens=4).json()
    assert body["receipt"]["choices"][0]["token_ids"] == list(b"base")
    assert body["choices"][0]["token_ids"] == list(b"hibase")


def test_several_prompts_have_no_one_receipt(server: Server) -> None:
    response = ask(server, "/v1/completions", prompt=["a", "b"], receipt=True)
    assert error_of(response, 400, "invalid_request")["param"] == "receipt"
    assert receipt_of(ask(server, "/v1/completions", prompt=["a"], receipt=True))["prompt"]["tokens"] == 1


def test_a_prompt_that_is_only_read_has_a_receipt_too(server: Server) -> None:
    response = ask(server, "/v1/completions", echo=True, max_tokens=0, logprobs=0, receipt=True)
    (choice,) = receipt_of(response)["choices"]
    assert (choice["tokens"], choice["finish_reason"]) == (0, "length")
