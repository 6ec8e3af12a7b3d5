"""/tokenize and /detokenize: the tokens that generation would see, and back."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tokenizers.processors import TemplateProcessing

from tests.api.conftest import BASE, Server, error_of
from tests.factories import BOS_ID, EOS_ID, VOCAB_SIZE

MESSAGES = [{"role": "user", "content": "hi"}]
BOTH = ("add_generation_prompt", "continue_final_message")


def tokenize(server: Server, **fields: Any) -> httpx.Response:
    return server.client.post("/tokenize", json=fields)


def tokens_of(server: Server, **fields: Any) -> list[int]:
    response = tokenize(server, **fields)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["tokens"]
    return tokens


@pytest.fixture
def bos_server(server: Server) -> Server:
    """A server whose tokenizer begins texts with BOS, as Llama's does."""
    processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS_ID)])
    server.state.tokenizer.underlying.backend_tokenizer.post_processor = processor
    return server


def test_a_prompt(server: Server) -> None:
    assert tokenize(server, prompt="h\u00fc", model=BASE).json() == {
        "count": 3,
        "max_model_len": 256,
        "tokens": [*"h\u00fc".encode()],
        "token_strs": None,
    }


def test_tokens_are_spelt_as_in_the_vocabulary(server: Server) -> None:
    assert tokenize(server, prompt="a b", return_token_strs=True).json()["token_strs"] == ["a", "\u0120", "b"]


def test_an_empty_prompt_has_no_tokens(server: Server) -> None:
    assert tokens_of(server, prompt="") == []


def test_special_tokens_are_added_unless_told_not_to(bos_server: Server) -> None:
    assert tokens_of(bos_server, prompt="a") == [BOS_ID, ord("a")]
    assert tokens_of(bos_server, prompt="a", add_special_tokens=True) == [BOS_ID, ord("a")]
    assert tokens_of(bos_server, prompt="a", add_special_tokens=False) == [ord("a")]


def test_tokens_are_what_a_generation_sees(bos_server: Server) -> None:
    bos_server.generate(prompt="a")
    bos_server.client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1})
    expected = [tokens_of(bos_server, prompt="a"), tokens_of(bos_server, messages=MESSAGES)]
    assert [list(request.prompt_ids) for request in bos_server.engine.requests] == expected


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "user: hi\nassistant: "),
        ({"add_generation_prompt": False}, "user: hi\n"),
        ({"continue_final_message": True}, "user: hi"),
        ({"add_special_tokens": False, "tools": [], "chat_template_kwargs": {}}, "user: hi\nassistant: "),
    ],
)
def test_messages_go_through_the_chat_template(server: Server, fields: dict[str, Any], text: str) -> None:
    assert bytes(tokens_of(server, messages=MESSAGES, **fields)).decode() == text


def test_an_unknown_model_is_not_found(server: Server) -> None:
    error_of(tokenize(server, prompt="a", model="nobody"), 404, "adapter_not_found")
    server.upload("sql")
    assert tokens_of(server, prompt="a", model="sql") == [ord("a")]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        (
            {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt",
        ),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "text": "b"}, "text"),
    ],
)
def test_what_does_not_go_together_is_refused(server: Server, fields: dict[str, Any], param: str) -> None:
    assert error_of(tokenize(server, **fields), 400, "invalid_request")["param"] == param


def detokenize(server: Server, tokens: Any, **fields: Any) -> httpx.Response:
    return server.client.post("/detokenize", json={"tokens": tokens, **fields})


def test_text_comes_back_as_it_was(bos_server: Server) -> None:
    text = "naïve  – text\n"
    tokens = tokens_of(bos_server, prompt=text)
    assert detokenize(bos_server, tokens, model=BASE).json() == {"prompt": f"<bos>{text}"}


def test_special_tokens_are_shown_and_padding_is_nothing(server: Server) -> None:
    assert detokenize(server, [ord("a"), EOS_ID, VOCAB_SIZE - 1]).json() == {"prompt": "a<eos>"}
    assert detokenize(server, []).json() == {"prompt": ""}


@pytest.mark.parametrize("tokens", [[1, VOCAB_SIZE], [-1], [2**70], ["1"], [1.0], "1", None, [[1]]])
def test_what_is_no_token_is_refused(server: Server, tokens: Any) -> None:
    error = error_of(detokenize(server, tokens), 400, "invalid_request")
    assert str(error["param"]).startswith("tokens")
