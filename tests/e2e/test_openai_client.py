"""OpenAI's own Python client against a server process: what its users call, with the answers held against PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import PreTrainedModel

from tests.factories import AdapterSpec, make_adapter, peft_greedy, peft_reference, save_model, tiny_model
from tests.server import Server

PROMPT = "The quick brown fox"
TOKENS = 12
ADAPTERS = {"sql": AdapterSpec(seed=1), "style": AdapterSpec(seed=2, compact=False)}
CHAT: list[Any] = [{"role": "user", "content": "hi"}]
RENDERED = "user: hi\nassistant: "


@dataclass(frozen=True)
class Case:
    client: OpenAI
    server: Server
    model: PreTrainedModel
    adapters: dict[str, Path]
    base: str

    def reference(self, name: str | None) -> Any:
        return self.model if name is None else peft_reference(self.model, self.adapters[name])

    def expected(self, name: str | None, prompt: str = PROMPT) -> str:
        """PEFT's greedy text."""
        return bytes(token for token in self.tokens(name, prompt) if token < 256).decode(errors="replace")

    def tokens(self, name: str | None, prompt: str = PROMPT) -> list[int]:
        return peft_greedy(self.reference(name), list(prompt.encode()), TOKENS)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("openai")
    model = tiny_model("llama")
    save_model(model, folder / "base")
    adapters = {name: make_adapter(model, spec, folder / name) for name, spec in ADAPTERS.items()}
    sources = [text for name, path in adapters.items() for text in ("--adapter", f"{name}={path}")]
    with (
        Server("serve", "--model", str(folder / "base"), *sources, data_dir=folder / "data") as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Case(client, server, model, adapters, "base")


def complete(case: Case, **fields: Any) -> Any:
    greedy = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return case.client.completions.create(**{**greedy, **fields})


def chat(case: Case, **fields: Any) -> Any:
    greedy = {"messages": CHAT, "max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return case.client.chat.completions.create(**{**greedy, **fields})


def test_models_are_listed(case: Case) -> None:
    models = {model.id: model for model in case.client.models.list()}
    assert set(models) == {case.base, "sql", "style"}
    assert case.client.models.retrieve("sql").id == "sql"
    with pytest.raises(openai.NotFoundError):
        case.client.models.retrieve("nobody")


@pytest.mark.parametrize("name", [None, "sql", "style"])
def test_completions_and_chats_are_pefts(case: Case, name: str | None) -> None:
    model = name or case.base
    answer = complete(case, model=model)
    assert answer.choices[0].text == case.expected(name)
    assert (answer.model, answer.choices[0].finish_reason) == (model, "length")
    assert answer.usage.completion_tokens == TOKENS
    streamed = "".join(chunk.choices[0].text for chunk in complete(case, model=model, stream=True))
    assert streamed == case.expected(name)
    expected = case.expected(name, RENDERED)
    assert chat(case, model=model).choices[0].message.content == expected
    chunks = [chunk.choices[0] for chunk in chat(case, model=model, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == expected
    assert chunks[0].delta.role == "assistant"
    assert chunks[-1].finish_reason == "length"


def test_a_blend_by_model_is_the_blend_by_fields(case: Case) -> None:
    by_model = complete(case, model="sql:0.7+style:0.3")
    parts = [{"name": "sql", "weight": 0.7}, {"name": "style", "weight": 0.3}]
    by_fields = complete(case, model=case.base, extra_body={"adapters": parts, "ignore_eos": True})
    merged = complete(case, model="sql:0.7+style:0.3", extra_body={"mode": "merge", "ignore_eos": True})
    assert by_model.choices[0].text == by_fields.choices[0].text == merged.choices[0].text
    assert by_model.choices[0].text not in (case.expected(None), case.expected("sql"), case.expected("style"))
    assert by_model.system_fingerprint == by_fields.system_fingerprint


def test_a_version_is_pinned_and_the_header_says_what_ran(case: Case) -> None:
    digest = case.server.http.get("/v1/adapters/sql").json()["digest"]
    raw = case.client.completions.with_raw_response.create(
        model=f"sql@{digest[:19]}", prompt=PROMPT, max_tokens=TOKENS, temperature=0, extra_body={"ignore_eos": True}
    )
    assert raw.headers["x-adapter-digest"] == digest
    assert raw.headers["x-request-id"]
    assert raw.parse().choices[0].text == case.expected("sql")


def test_usage_comes_last_in_a_stream(case: Case) -> None:
    for chunks in (
        list(complete(case, model="sql", stream=True, stream_options={"include_usage": True})),
        list(chat(case, model="sql", stream=True, stream_options={"include_usage": True})),
    ):
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == TOKENS
        assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_prompt_that_is_known_is_counted_as_cached(case: Case) -> None:
    prompt = "a prompt of more than two blocks of sixteen tokens"
    first, again = (complete(case, model="style", prompt=prompt).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert again.prompt_tokens_details.cached_tokens == 48
    assert first.prompt_tokens == again.prompt_tokens == len(prompt)


def test_a_seed_repeats_and_choices_differ(case: Case) -> None:
    fields = {"model": "sql", "temperature": 1.0, "seed": 7, "n": 3, "extra_body": {"ignore_eos": True}}
    once, again = (chat(case, **fields) for _ in range(2))
    texts = [choice.message.content for choice in once.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3


def test_a_list_of_prompts_and_prompts_of_tokens(case: Case) -> None:
    prompts = [PROMPT, "a"]
    texts = [case.expected("sql", prompt) for prompt in prompts]
    as_tokens = [list(prompt.encode()) for prompt in prompts]
    for prompt in (prompts, as_tokens):
        answer = complete(case, model="sql", prompt=prompt, n=2)
        assert [choice.text for choice in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [None, "sql"])
def test_the_prompts_logprobs_are_the_models(case: Case, name: str | None) -> None:
    prompt = PROMPT * 3
    ids = list(prompt.encode())
    with torch.inference_mode():
        reference = case.reference(name)(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(reference[i - 1, ids[i]]) for i in range(1, len(ids))]
    answer = complete(case, model=name or case.base, prompt=prompt, echo=True, logprobs=3, max_tokens=0)
    (choice,) = answer.choices
    assert (choice.text, answer.usage.completion_tokens) == (prompt, 0)
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    likeliest = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
    assert likeliest == pytest.approx(reference[:-1].amax(-1).tolist(), abs=1e-4)
    with_output = complete(case, model=name or case.base, prompt=prompt, echo=True, logprobs=0)
    assert with_output.choices[0].text == prompt + case.expected(name, prompt)
    assert with_output.choices[0].logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    assert len(with_output.choices[0].logprobs.tokens) == len(ids) + TOKENS


def test_bias_and_penalties_change_what_is_said(case: Case) -> None:
    first = case.tokens("sql")[0]
    answer = complete(case, model="sql", logit_bias={str(first): -100}, logprobs=1)
    reported = answer.choices[0].logprobs
    assert max(reported.top_logprobs[0].values()) > reported.token_logprobs[0], "another one was likelier"
    forced = complete(case, model="sql", logit_bias={str(ord("z")): 100})
    assert forced.choices[0].text == "z" * TOKENS
    repeating = {"logit_bias": {str(ord("z")): 20}, "max_tokens": 40}
    assert complete(case, model="sql", **repeating).choices[0].text == "z" * 40
    for penalty in ({"frequency_penalty": 2.0}, {"extra_body": {"repetition_penalty": 1e6, "ignore_eos": True}}):
        varied = complete(case, model="sql", **repeating, **penalty).choices[0].text
        assert varied.startswith("z")
        assert varied != "z" * 40


def test_stop_ends_the_text(case: Case) -> None:
    whole = case.expected("sql")
    answer = complete(case, model="sql", stop=[whole[4:6]])
    assert answer.choices[0].text == whole[: whole.index(whole[4:6])]
    assert answer.choices[0].finish_reason == "stop"


def test_structured_output_follows_its_schema(case: Case) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"type": "integer", "minimum": 3, "maximum": 11}, "kind": {"enum": ["a", "b"]}},
        "required": ["size", "kind"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    seen = set()
    for seed in range(8):
        answer = chat(
            case, model="sql", max_tokens=80, response_format=wanted, temperature=1.0, seed=seed, extra_body={}
        )
        assert answer.choices[0].finish_reason == "stop"
        thing = json.loads(answer.choices[0].message.content)
        assert set(thing) == {"size", "kind"}
        assert 3 <= thing["size"] <= 11
        assert thing["kind"] in ("a", "b")
        seen.add((thing["size"], thing["kind"]))
    assert len(seen) > 1, "the model still chooses"
    choice = complete(case, model="sql", extra_body={"guided_choice": ["left", "right"]}).choices[0]
    assert (choice.text in ("left", "right"), choice.finish_reason) == (True, "stop")
    plate = complete(case, model=case.base, extra_body={"guided_regex": "[A-Z]{2}-[0-9]{3}"}).choices[0].text
    assert len(plate) == 6
    assert plate[2] == "-"


def test_a_forced_tool_call(case: Case) -> None:
    parameters = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}}
    parameters |= {"required": ["n"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "roll", "parameters": parameters}}]
    for tool_choice in ("required", {"type": "function", "function": {"name": "roll"}}):
        fields = {"model": "sql", "tools": tools, "tool_choice": tool_choice, "max_tokens": 120, "extra_body": {}}
        fields["parallel_tool_calls"] = False
        (choice,) = chat(case, **fields).choices
        (call,) = choice.message.tool_calls
        ending = "tool_calls" if tool_choice == "required" else "stop"
        assert (choice.finish_reason, call.function.name) == (ending, "roll")
        assert 0 <= json.loads(call.function.arguments)["n"] <= 9
        again = [*CHAT, choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "4"}]
        assert chat(case, model="sql", messages=again).choices[0].message.content is not None
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        chat(case, model="sql", tools=tools)


def test_errors_are_the_clients_exceptions(case: Case) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        complete(case, model="nobody")
    assert missing.value.code == "adapter_not_found"
    with pytest.raises(openai.BadRequestError) as unknown:
        complete(case, model="sql", extra_body={"tempurature": 1})
    assert unknown.value.param == "tempurature"
    with pytest.raises(openai.BadRequestError) as long:
        complete(case, model="sql", prompt="x" * 1000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="best_of"):
        complete(case, model="sql", best_of=2)
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        complete(case, model="sql", logit_bias={"9999": 1})
    with pytest.raises(openai.BadRequestError, match="something else"):
        complete(case, model="sql", extra_body={"adapter": "style"})


def test_a_client_that_leaves_frees_its_row(case: Case) -> None:
    stream = complete(case, model="sql", max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    assert complete(case, model="sql").choices[0].text == case.expected("sql")
