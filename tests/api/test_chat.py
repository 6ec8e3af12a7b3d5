"""POST /v1/chat/completions: templates, tools, and what is answered."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from adapters.errors import AdapterNotFound
from service.api.chat import template_of
from service.api.schemas.chat import ChatRequest
from service.api.selection import resolve
from service.engine.selection import SelectionSpec
from service.engine.sequence import SamplingParams
from tests.api.conftest import BASE, Server, error_of
from tests.api.test_completions import events_of
from tests.fakes import Failure, fake_text

HI = [{"role": "user", "content": "hi"}]
PROMPT = "user: hi\nassistant: "  # as the tests' tokenizer has it

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def chat(server: Server, messages: Any = HI, **fields: Any) -> httpx.Response:
    return server.client.post("/v1/chat/completions", json={"messages": messages, **fields})


def prompt_of(server: Server) -> str:
    """The text that the last conversation became."""
    return bytes(server.engine.requests[-1].prompt_ids).decode()


def test_answers_as_openai_does(server: Server) -> None:
    body = chat(server, model=BASE, max_tokens=8).json()
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "chat.completion",
        "model": BASE,
        "system_fingerprint": "vblora-0123456789abcdef",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "base;bas", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": len(PROMPT),
            "completion_tokens": 8,
            "total_tokens": len(PROMPT) + 8,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert prompt_of(server) == PROMPT, "no special tokens are added to the template's"


def test_model_selects(server: Server) -> None:
    server.upload("sql", "one")
    server.upload("style", "two")
    response = chat(server, model="sql:0.7+style:0.3", max_tokens=80)
    header = f"{server.digest('sql')}:0.7,{server.digest('style')}:0.3"
    assert response.headers["x-adapter-digest"] == header
    assert response.json()["choices"][0]["message"]["content"] == fake_text(header, 80)
    error_of(chat(server, model="nobody"), 404, "adapter_not_found")
    error_of(chat(server, model="sql", adapter="style"), 400, "invalid_request")


def test_null_means_the_default(server: Server) -> None:
    names = set(ChatRequest.model_fields) - {"messages"}
    assert chat(server, **dict.fromkeys(names)).status_code == 200
    room = server.engine.max_context - len(PROMPT)
    assert server.engine.requests[0].params == SamplingParams(max_new_tokens=room)


def test_how_long_an_answer_may_be(make_server: Any) -> None:
    server = make_server(default_max_tokens=20)

    def longest(messages: Any = HI, **fields: Any) -> int:
        assert chat(server, messages, **fields).status_code == 200
        return server.engine.requests[-1].params.max_new_tokens

    assert longest() == 20
    assert longest(max_tokens=50) == longest(max_completion_tokens=50) == 50
    assert longest(max_tokens=50, max_completion_tokens=50) == 50
    assert longest([{"role": "user", "content": "x" * 223}]) == 256 - 223 - len(PROMPT) + 2
    assert longest([{"role": "user", "content": "x" * 300}]) == 1, "the engine refuses it by name"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"functions": []}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER]}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER], "tool_choice": "required"}, "tools"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": "required", "guided_regex": "x"}, "tool_choice"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_is_refused_names_the_field(server: Server, fields: dict[str, Any], param: str) -> None:
    error = error_of(chat(server, **{"messages": HI, **fields}), 400, "invalid_request")
    assert error["param"].startswith(param), error
    assert server.engine.requests == []


# --- messages -------------------------------------------------------------------------------------


def test_messages_of_every_kind(server: Server) -> None:
    chat(
        server,
        [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "eve"},
            {"role": "assistant", "content": None, "refusal": "no", "annotations": [], "audio": None},
            {"role": "user", "content": "c"},
        ],
    )
    assert prompt_of(server) == "system: be brief\nuser: a\nb\nassistant: no\nuser: c\nassistant: "


def test_the_last_message_is_continued(server: Server) -> None:
    chat(server, [*HI, {"role": "assistant", "content": "Once upon"}], continue_final_message=True)
    assert prompt_of(server) == "user: hi\nassistant: Once upon"
    chat(server, add_generation_prompt=False)
    assert prompt_of(server) == "user: hi\n"


def test_an_adapters_own_template_is_used(server: Server) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<{{ style or 'me' }}>"
    bring_template(server, "own", template)
    server.upload("plain", "two")
    chat(server, model="own", chat_template_kwargs={"style": "you"})
    assert prompt_of(server) == "<user>hi<you>"
    chat(server, model="plain")
    assert prompt_of(server) == PROMPT
    chat(server, model="own:0.5+plain:0.5")
    assert prompt_of(server) == "<user>hi<me>", "the one template that a blend's adapters bring"
    bring_template(server, "other", "{{ messages[0].content }}", "logits", as_config=True)
    chat(server, model="other")
    assert prompt_of(server) == "hi"
    error = error_of(chat(server, model="own+other"), 400, "invalid_request")
    assert "different chat templates" in error["message"]


def test_the_template_of_what_is_deleted_meanwhile_is_found_when_it_is_back(server: Server) -> None:
    bring_template(server, "own", "{{ messages[0].content }}")
    selection = resolve(server.state, "", SelectionSpec.of("own", None))
    server.client.delete("/v1/adapters/own")
    with pytest.raises(AdapterNotFound):
        template_of(server.state, selection)
    bring_template(server, "own", "{{ messages[0].content }}")
    assert template_of(server.state, selection) == "{{ messages[0].content }}"


def bring_template(server: Server, name: str, template: str, adapter: str = "one", *, as_config: bool = False) -> None:
    """Uploads an adapter with a chat template of its own."""
    config = json.dumps({"chat_template": [{"name": "default", "template": template}]})
    part = {"tokenizer_config": config.encode()} if as_config else {"chat_template": template.encode()}
    files = {**server.form(adapter), **part}
    response = server.client.post("/v1/adapters?replace=true", data={"name": name}, files=files)
    assert response.status_code == 201, response.text


def test_no_template_at_all_is_said(server: Server) -> None:
    server.state.tokenizer.underlying.chat_template = None  # type: ignore[attr-defined]
    error = error_of(chat(server), 400, "invalid_request")
    assert "/v1/completions" in error["message"]
    bring_template(server, "own", "{{ messages[0].content }}!")
    assert chat(server, model="own").status_code == 200
    assert prompt_of(server) == "hi!"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}", "2,000,000 steps"),
        ("{{ 9 ** (9 ** 9) }}", "16,384 bits"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_refuses_says_why(server: Server, template: str, reason: str) -> None:
    bring_template(server, "own", template)
    error = error_of(chat(server, model="own"), 400, "invalid_request")
    assert reason in error["message"]
    assert error["param"] == "messages"


# --- log-probabilities and streams ----------------------------------------------------------------


def test_logprobs_in_openais_columns(server: Server) -> None:
    body = chat(server, max_tokens=1, logprobs=True, top_logprobs=1).json()
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "b",
                "logprob": -0.5,
                "bytes": [98],
                "top_logprobs": [{"token": "a", "logprob": -1.0, "bytes": [97]}],
            }
        ],
        "refusal": None,
    }
    body = chat(server, max_tokens=1, logprobs=True).json()
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_stream_in_openais_events(server: Server) -> None:
    server.upload("sql")
    fields = {"model": "sql", "max_tokens": 5, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    response = chat(server, **fields)
    *events, last = events_of(response)
    assert response.headers["x-adapter-digest"] == server.digest("sql")
    assert {(event["object"], event["model"], event["usage"]) for event in events} == {
        ("chat.completion.chunk", "sql", None)
    }
    for index in range(2):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"]["content"] for choice in choices) == fake_text(server.digest("sql"), 5)
        assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["length"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 10


def test_a_failure_within_a_stream_is_an_error_event(server: Server) -> None:
    server.engine.failure = Failure("internal_error", "the engine failed", after=2)
    response = chat(server, stream=True, max_tokens=8)
    assert "event: error\ndata: " in response.text
    assert "[DONE]" not in response.text


def test_a_part_of_a_character_has_its_bytes(server: Server) -> None:
    server.engine.script = "\xe2\x82\xac"  # three tokens, which are bytes: €
    (choice,) = chat(server, logprobs=True).json()["choices"]
    assert [token["bytes"] for token in choice["logprobs"]["content"]] == [[0xE2], [0x82], [0xAC]]


# --- tools ----------------------------------------------------------------------------------------

NAMED = {"type": "function", "function": {"name": "weather"}}
ARGUMENTS = '{"town": "Graz"}'
BOTH = f'[{{"name": "weather", "parameters": {ARGUMENTS}}}, {{"name": "clock", "parameters": {{}}}}]'


def called(message: dict[str, Any]) -> list[tuple[str, Any]]:
    """The calls of a message that holds nothing else."""
    assert message["content"] is None
    calls = message["tool_calls"]
    assert all(set(call) == {"id", "type", "function"} and call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def test_a_tool_called_by_name(server: Server) -> None:
    server.engine.script = ARGUMENTS
    (choice,) = chat(server, tools=[WEATHER, CLOCK], tool_choice=NAMED).json()["choices"]
    assert called(choice["message"]) == [("weather", {"town": "Graz"})]
    assert choice["finish_reason"] == "stop"


def test_some_tool_called(server: Server) -> None:
    server.engine.script = BOTH
    (choice,) = chat(server, tools=[WEATHER, CLOCK], tool_choice="required").json()["choices"]
    assert called(choice["message"]) == [("weather", {"town": "Graz"}), ("clock", {})]
    assert choice["finish_reason"] == "tool_calls"


def test_one_call_at_most(server: Server) -> None:
    chat(server, tools=[CLOCK], tool_choice="required", parallel_tool_calls=False)
    (request,) = server.engine.requests
    assert request.grammar is not None
    guide = request.grammar.start()
    for byte in b'[{"name": "clock", "parameters": {}}':
        guide.accept(byte)
    assert guide.allowed().nonzero().flatten().tolist() == [ord("]")]


def test_a_call_that_was_cut_off_is_text(server: Server) -> None:
    server.engine.script = BOTH
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": 12}
    (choice,) = chat(server, **fields).json()["choices"]
    assert choice["message"]["content"] == BOTH[:12]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "length"
    (*_, last) = events_of(chat(server, **fields, stream=True))
    assert last["choices"][0]["delta"] == {"content": BOTH[:12]}
    assert last["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("tool_choice", "script"), [(NAMED, ARGUMENTS), ("required", BOTH)])
def test_a_stream_of_calls(server: Server, tool_choice: Any, script: str) -> None:
    server.engine.script = script
    events = events_of(chat(server, tools=[WEATHER, CLOCK], tool_choice=tool_choice, stream=True))
    calls: dict[int, list[Any]] = {}
    for event in events:
        delta = event["choices"][0]["delta"]
        assert not delta.get("content")
        for part in delta.get("tool_calls", ()):
            if part["index"] not in calls:
                assert part["id"].startswith("call_")
                calls[part["index"]] = [part["function"]["name"], ""]
            calls[part["index"]][1] += part["function"]["arguments"]
    assert events[-1]["choices"][0]["finish_reason"] == ("tool_calls" if tool_choice == "required" else "stop")
    expected = [("weather", {"town": "Graz"})] + ([("clock", {})] if tool_choice == "required" else [])
    assert [(name, json.loads(arguments)) for name, arguments in calls.values()] == expected


def test_templates_see_the_tools_and_the_calls_made(server: Server) -> None:
    template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.town }};{% endfor %}"
        "{{ m.role }}={{ m.content }}|{% endfor %}"
    )
    bring_template(server, "own", template)
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    turns = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert chat(server, turns, model="own", tools=[WEATHER, CLOCK], tool_choice="none").status_code == 200
    assert prompt_of(server) == "user=hi|Graz;assistant=|tool=rain|", "no tool may be called: none is shown"
    server.engine.script = BOTH
    assert chat(server, turns, model="own", tools=[WEATHER, CLOCK], tool_choice="required").status_code == 200
    assert prompt_of(server) == "[weather][clock]user=hi|Graz;assistant=|tool=rain|"
    call["function"]["arguments"] = "{"  # type: ignore[index]
    error_of(chat(server, turns, model="own"), 400, "invalid_request")


def test_definitions_of_two_tools_may_not_clash(server: Server) -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": kind}}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    alike = [tool("a", "integer"), tool("b", "integer")]
    server.engine.script = '[{"name": "b", "parameters": {"x": 1}}]'
    assert chat(server, tools=alike, tool_choice="required").status_code == 200
    error_of(
        chat(server, tools=[tool("a", "integer"), tool("b", "null")], tool_choice="required"), 400, "invalid_request"
    )


@pytest.mark.parametrize("keyword", ["$defs", "definitions"])
@pytest.mark.parametrize("wrong", [None, [], "x", [1]])
def test_definitions_are_an_object(server: Server, keyword: str, wrong: Any) -> None:
    tool = {"type": "function", "function": {"name": "a", "parameters": {"type": "object", keyword: wrong}}}
    error = error_of(chat(server, tools=[tool], tool_choice="required"), 400, "invalid_request")
    assert keyword in error["message"]


def test_definitions_by_their_older_name(server: Server) -> None:
    parameters = {"properties": {"x": {"$ref": "#/definitions/X"}}, "definitions": {"X": {"const": 1}}}
    server.engine.script = '[{"name": "a", "parameters": {"x": 1}}]'
    tools = [{"type": "function", "function": {"name": "a", "parameters": parameters}}]
    (choice,) = chat(server, tools=tools, tool_choice="required").json()["choices"]
    assert called(choice["message"]) == [("a", {"x": 1})]


@pytest.mark.parametrize("tool_choice", [NAMED, "required"])
def test_parameters_that_say_nothing_are_any_object(server: Server, tool_choice: Any) -> None:
    chat(
        server, tools=[{"type": "function", "function": {"name": "weather", "parameters": {}}}], tool_choice=tool_choice
    )
    (request,) = server.engine.requests
    assert request.grammar is not None
    guide = request.grammar.start()
    for byte in b"" if tool_choice == NAMED else b'[{"name": "weather", "parameters": ':
        guide.accept(byte)
    assert guide.allowed().nonzero().flatten().tolist() == [ord("{")]


def test_what_openais_client_adds_to_a_message_may_be_sent_back(server: Server) -> None:
    """Its stream() and parse() answer with messages that hold more than the server's own."""
    function = {"name": "weather", "arguments": ARGUMENTS, "parsed_arguments": {"town": "Graz"}}
    call = {"id": "call_1", "type": "function", "function": function, "index": 0}
    turn = {"role": "assistant", "content": "", "parsed": {"x": 1}, "annotations": None, "tool_calls": [call]}
    server.upload("own")
    bring_template(server, "own", "{{ messages[0] | tojson }}")
    assert chat(server, [turn], model="own").status_code == 200
    shown = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Graz"}}}
    assert json.loads(prompt_of(server)) == {"role": "assistant", "content": "", "tool_calls": [shown]}


# --- tools that the model may call ----------------------------------------------------------------

TAGGED = "{% for t in tools or [] %}call {{ t.function.name }} as <tool_call>{% endfor %}{{ messages[-1].content }}"
ONE = '<tool_call>\n{"name": "weather", "arguments": {"town": "Graz"}}\n</tool_call>'
TWO = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'


def free_call(server: Server, script: str, **fields: Any) -> httpx.Response:
    bring_template(server, "tagged", TAGGED)
    server.engine.script = script
    return chat(server, model="tagged", tools=[WEATHER, CLOCK], **fields)


@pytest.mark.parametrize(
    ("script", "content", "calls"),
    [
        ("It rains.", "It rains.", []),
        (ONE, None, [("weather", {"town": "Graz"})]),
        (f"Let me see. {ONE}\n{TWO}", "Let me see. \n", [("weather", {"town": "Graz"}), ("clock", {})]),
        ("a < b <tool", "a < b <tool", []),
        (f"x<tool_call>no JSON</tool_call>y{TWO}", "x<tool_call>no JSON</tool_call>y", [("clock", {})]),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        (f"{TWO}<tool_call>" + '{"name": "we', '<tool_call>{"name": "we', [("clock", {})]),
    ],
)
def test_a_model_may_call_tools(server: Server, script: str, content: str | None, calls: list[Any]) -> None:
    (choice,) = free_call(server, script).json()["choices"]
    assert prompt_of(server) == "call weather as <tool_call>call clock as <tool_call>hi"
    assert choice["message"]["content"] == content
    made = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls_of(choice)]
    assert made == calls
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")

    events = events_of(free_call(server, script, tool_choice="auto", stream=True))
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == (content or "")
    streamed = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in streamed] == list(range(len(calls)))
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in streamed] == calls
    assert events[-1]["choices"][0]["finish_reason"] == ("tool_calls" if calls else "stop")


def test_of_several_calls_the_first_is_kept_if_they_may_not_be_parallel(server: Server) -> None:
    script = f"Let me see. {ONE}{TWO} Done."
    (choice,) = free_call(server, script, parallel_tool_calls=False).json()["choices"]
    assert choice["message"]["content"] == "Let me see.  Done."
    assert [call["function"]["name"] for call in calls_of(choice)] == ["weather"]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_surrogate_pair_in_a_call_stays_an_escape(server: Server, *, stream: bool) -> None:
    script = '<tool_call>{"name": "f\\ud800", "arguments": {"town": "\\ud83d Graz"}}</tool_call>'
    answer = free_call(server, script, stream=stream)
    choices = [event["choices"][0] for event in events_of(answer)] if stream else answer.json()["choices"]
    (call,) = [call for choice in choices for call in choice["delta" if stream else "message"].get("tool_calls", ())]
    assert call["function"]["name"] == "f\\ud800"
    assert call["function"]["arguments"] == '{"town": "\\ud83d Graz"}'


def calls_of(choice: dict[str, Any]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = choice["message"].get("tool_calls", [])
    return calls


def test_a_template_without_tags_leaves_no_choice(server: Server) -> None:
    error = error_of(chat(server, tools=[WEATHER]), 400, "invalid_request")
    assert "<tool_call>" in error["message"]
