"""Adapters' templates: real ones render as in transformers, bombs end by a limit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.chat_template import ChatTemplateError, render_bounded
from service.engine.template_meter import MAX_UNITS
from service.engine.tokenizer import TextTokenizer
from tests.factories import byte_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather of a <town> & its "surroundings"',
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}, "days": {"type": "integer", "enum": [1, 2]}},
            "required": ["town"],
        },
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Zürich", "days": 2}}}
CHAT = [
    {"role": "system", "content": "  You help. "},
    {"role": "user", "content": "Is it raining?\nIn Zürich & <Genf>"},
    {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": true}', "tool_call_id": "c1"},
    {"role": "assistant", "content": "<think>it does</think>\n\nYes. "},
    {"role": "user", "content": "Thanks "},
]

HEADERS = """\
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call at a time!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot|>" }}
    {%- else %}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""

TAGGED = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>: <tool_call>\\n{\\"name\\": …}</tool_call><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string
        and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n<think>' + reasoning.strip('\\n') + '</think>' + content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>' ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>' }}{%- endif %}
{%- endif %}
"""

BRACKETS = """\
{%- if messages[0]["role"] == "system" -%}
    {%- set system_message = messages[0]["content"] -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list -%}
{{- bos_token -}}
{%- for message in loop_messages | rejectattr("tool_calls") -%}
    {%- if message["role"] == "user" -%}
        {%- if tools is not none and (message == user_messages[-1]) -%}
            {{- "[TOOLS] [" -}}
            {%- for tool in tools -%}
                {%- set tool = tool.function -%}
                {{- '{"type": "function", "function": {' -}}
                {%- for key, val in tool.items() if key != "return" -%}
                    {%- if val is string -%}{{- '"' + key + '": "' + val + '"' -}}
                    {%- else -%}{{- '"' + key + '": ' + val|tojson -}}{%- endif -%}
                    {%- if not loop.last -%}{{- ", " -}}{%- endif -%}
                {%- endfor -%}
                {{- "}}" -}}
                {%- if not loop.last -%}{{- ", " -}}{%- else -%}{{- "]" -}}{%- endif -%}
            {%- endfor -%}
            {{- "[/TOOLS]" -}}
        {%- endif -%}
        {%- if loop.last and system_message is defined -%}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" -}}
        {%- else -%}{{- "[INST] " + message["content"] + "[/INST]" -}}{%- endif -%}
    {%- elif message["role"] in ["tool", "tool_results"] -%}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}' -}}
    {%- else -%}{% generation %}{{- " " + message["content"]|trim + eos_token -}}{% endgeneration %}{%- endif -%}
{%- endfor -%}
"""

TURNS = """\
{{ bos_token }}{% macro turn(role, text) %}<start_of_turn>{{ role }}
{{ text | trim }}<end_of_turn>
{% endmacro %}
{% set roles = {'assistant': 'model', 'user': 'user'} %}
{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}
{% if strict and (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}{{ turn(roles.get(message.role, message.role)|upper, message.content) }}{% endfor %}
{% call(x) joined(['a', 'b']) %}{{ x }}{% endcall %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
TURNS = TURNS.replace("{% set roles", "{% macro joined(l) %}{{ caller(l | join(', ')) }}{% endmacro %}{% set roles", 1)

PIECES = """\
{% for x in [1, 2.5, none, true, 'é' * 3, [1, (2,)], {'a': "b'"}] %}{{ x }} {{ x ~ '|' }}{% endfor %}
{{ [3, 1, 2] | sort | reverse | map('string') | join('-') }} {{ range(3) | list }}
{{ 7 // 2 }} {{ 2 ** 10 }} {{ 7 % 4 }}
{{ 'a-b-c'.replace('-', '+', 1) }} {{ 'abc' | replace('b', 'xx') | upper }} {{ ', '.join(['x', 'y']) }}
{{ {'b': 1, 'a': {'c': [1, 2]}} | tojson(indent=2, sort_keys=true, separators=(',', ' : ')) }} {{ 'é<' | tojson }}
{{ {'b': 1, 'a': 2} | dictsort }} {{ {'b': 1} | items | list }} {{ dict(a=1).keys() | list }} {{ messages | first }}
{{ 'x\\ny' | indent(2) }} {{ 3.14159 | round(2) }} {{ '12' | int + 1 }}
{{ undefined_thing }} {{ [1, 1, 2] | unique | list }}
{% for node in [{'n': 1, 'below': [{'n': 2}]}] recursive %}<{{ node.n }}{{ loop(node.below or []) }}>{% endfor %}
{% set block %}{{ messages | length }} messages{% endset %}{{ block | trim | capitalize }}
{{ '<b>' | e }} {{ '<b>' | safe }}
{% filter lower %}ABC{% endfilter %} {{ 'b' in ['a', 'b'] }} {{ 1 < 2 <= 2 }} {{ [1, 2] == [1, 2] }} {{ 'abc'[::-1] }}
{{ cycler('odd', 'even').next() }} {% for c in 'ab' if c != 'a' %}{{ loop.index }}{{ c }}{% else %}none{% endfor %}"""

REAL = {"headers": HEADERS, "tagged": TAGGED, "brackets": BRACKETS, "turns": TURNS, "pieces": PIECES}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(byte_tokenizer(), vocabulary=272)


def bounded(template: str, messages: Any = None, **fields: Any) -> str:
    options = {"tools": None, "add_generation_prompt": False, "continue_final_message": False, "variables": {}}
    return render_bounded(template, messages or [{"role": "user", "content": "hi"}], **{**options, **fields})


@pytest.mark.parametrize("tools", [None, [WEATHER], [WEATHER, WEATHER]])
@pytest.mark.parametrize("name", REAL)
def test_real_templates_render_as_in_transformers(tokenizer: TextTokenizer, name: str, tools: Any) -> None:
    for end in range(1, len(CHAT) + 1):
        for adding in (True, False):
            fields = {"add_generation_prompt": adding, "continue_final_message": False}
            expected = tokenizer.underlying.apply_chat_template(
                CHAT[:end], chat_template=REAL[name], tools=tools, tokenize=False, enable_thinking=False, **fields
            )
            rendered = tokenizer.render_chat(
                CHAT[:end], template=REAL[name], tools=tools, variables={"enable_thinking": False}, **fields
            )
            assert rendered == expected


@pytest.mark.parametrize("content", ["Yes, it", "Yes, it ", " Yes\n"])
@pytest.mark.parametrize("name", ["headers", "tagged", "turns"])
def test_the_final_message_is_continued_as_in_transformers(tokenizer: TextTokenizer, name: str, content: str) -> None:
    chat = [CHAT[1], {"role": "assistant", "content": content}]
    expected = tokenizer.underlying.apply_chat_template(
        chat, chat_template=REAL[name], tokenize=False, continue_final_message=True
    )
    assert expected.rstrip().endswith(content.strip())
    fields: dict[str, Any] = {"tools": None, "add_generation_prompt": False, "variables": {}}
    assert tokenizer.render_chat(chat, template=REAL[name], continue_final_message=True, **fields) == expected


@pytest.mark.parametrize("template", ["{{ messages[-1].role }}", "{{ messages[0].content }}", "{{ 'content' }}"])
def test_a_message_that_is_not_shown_cannot_be_continued(template: str) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Yes"}]
    with pytest.raises(ChatTemplateError, match="continued"):
        bounded(template, chat, continue_final_message=True)


@given(st.text(), st.sampled_from([HEADERS, TAGGED, BRACKETS, TURNS]))
def test_any_content_renders_as_in_transformers(content: str, template: str) -> None:
    own = TextTokenizer(byte_tokenizer(), vocabulary=272)
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    fields = {"add_generation_prompt": True, "continue_final_message": False}
    expected = own.underlying.apply_chat_template(chat, chat_template=template, tokenize=False, **fields)
    assert own.render_chat(chat, template=template, tools=None, variables={}, **fields) == expected


def test_a_long_conversation_is_well_within_the_limits() -> None:
    turns = [{"role": role, "content": f"Turn {i}. " * 40} for i in range(1000) for role in ("user", "assistant")]
    for template in (HEADERS, TAGGED, BRACKETS):
        text = bounded(template, turns, tools=[WEATHER] * 20, variables={"bos_token": "", "eos_token": ""})
        assert text.count("Turn 999.") == 80


TOO_MUCH = "more than 2,000,000 steps"
TWICE = "{% set ns = namespace(x=('a', 'a')) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
AGAIN = TWICE.replace("ns", "other")
BOMBS = {
    "nested loops": ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", TOO_MUCH),
    "loops that select nothing": (
        "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
        TOO_MUCH,
    ),
    "a recursive loop": ("{% for a in range(99) recursive %}{{ loop(range(99)) }}{% endfor %}", "steps|recursion"),
    "macros": (
        "{% macro m0() %}{% endmacro %}"
        + "".join(f"{{% macro m{i + 1}() %}}{f'{{{{ m{i}() }}}}' * 9}{{% endmacro %}}" for i in range(9))
        + "{{ m9() }}",
        TOO_MUCH,
    ),
    "blocks": (
        "".join(f"{{% block b{i} %}}{f'{{{{ self.b{i + 1}() }}}}' * 9}{{% endblock %}}" for i in range(9))
        + "{% block b9 %}{% endblock %}",
        TOO_MUCH,
    ),
    "much from little": ("{% for a in range(9999) %}" + "x" * 30_000 + "{% endfor %}", "8,388,608 characters"),
    "much work from little": ("{% for a in range(9999) %}" + "{% set b = a %}" * 1000 + "{% endfor %}", TOO_MUCH),
    "a long text": ("{{ 'a' * 10 ** 9 }}", TOO_MUCH),
    "a long list": ("{{ [0] * 10 ** 9 }}", TOO_MUCH),
    "a number from the left": ("{{ 10 ** 9 * 'a' }}", TOO_MUCH),
    "doubling": (
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        TOO_MUCH,
    ),
    "adding": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        TOO_MUCH,
    ),
    "too much written": ("{% for a in range(9999) %}{{ 'a' * 5000 }}{% endfor %}", "more than 8,388,608 characters"),
    "a power": ("{{ 9 ** (9 ** 9) }}", "16,384 bits"),
    "squares": (
        "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "16,384 bits",
    ),
    "digits": ("{{ ('f' * 9999) | int(base=16) }}", "16,384 bits"),
    "a precision": ("{{ 1 | round(10 ** 9, 'ceil') }}", "20 digits"),
    "replacing": ("{% set x = 'a' * 9999 %}{{ x.replace('a', x) }}", TOO_MUCH),
    "a filter that replaces": ("{% set x = 'a' * 9999 %}{{ x | replace('a', x) }}", TOO_MUCH),
    "joining": ("{% set x = 'a' * 9999 %}{{ x.join(x) }}", TOO_MUCH),
    "a filter that joins": ("{% set x = 'a' * 9999 %}{{ x | join(x) }}", TOO_MUCH),
    "joining generated": ("{% set x = 'a' * 9999 %}{{ x.join(range(9999) | map('string')) }}", TOO_MUCH),
    "an indentation": ("{{ 'a' | indent(10 ** 9) }}", "64 characters"),
    "JSON's indentation": ("{{ [1] | tojson(indent=10 ** 9) }}", "64 characters"),
    "JSON's separators": ("{{ (range(9999) | list) | tojson(separators=('a' * 9999, 'b')) }}", TOO_MUCH),
    "what is shared, printed": (TWICE + "{{ ns.x }}", TOO_MUCH),
    "what is shared, in a namespace": (TWICE + "{{ [ns] }}", TOO_MUCH),
    "what is shared, joined": (TWICE + "{{ [ns.x] | join }}", TOO_MUCH),
    "what is shared, in JSON": (TWICE + "{{ ns.x | tojson }}", TOO_MUCH),
    "what is shared, compared": (TWICE + AGAIN + "{{ ns.x == other.x }}", TOO_MUCH),
    "what is shared, compared in a row": (TWICE + AGAIN + "{{ 1 != ns.x == other.x }}", TOO_MUCH),
    "what is shared, looked for": (TWICE + AGAIN + "{{ ns.x in [other.x] }}", TOO_MUCH),
    "what is shared, tested": (TWICE + AGAIN + "{{ ns.x is eq(other.x) }}", TOO_MUCH),
    "what is shared, selected": (TWICE + AGAIN + "{{ [ns.x] | select('eq', other.x) | list }}", TOO_MUCH),
    "what is shared, sorted": (TWICE + AGAIN + "{{ [ns, other] | map(attribute='x') | sort }}", TOO_MUCH),
    "what is shared, a key": (TWICE + "{{ {ns.x: 1} }}", TOO_MUCH),
    "what is shared, a generated key": (TWICE + "{{ dict([[ns.x, 1]] | map('list')) }}", TOO_MUCH),
    "what is shared, looked up": (TWICE + "{{ {}[ns.x].y }}", TOO_MUCH),
    "what is shared, got": (TWICE + "{{ {}.get(ns.x) }}", TOO_MUCH),
    "what is shared, raised": (TWICE + "{{ raise_exception(ns.x) }}", TOO_MUCH),
    "a namespace in itself": ("{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x }}", "deeper than 100|steps"),
    "depth": (
        "{% set ns = namespace(x=()) %}{% for i in range(9999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {}[ns.x] }}",
        "deeper than 100",
    ),
    "long searches": ("{% set x = 'a' * 300000 %}{{ x.rfind('b' ~ x[:150000]) }}", TOO_MUCH),
    "long trimming": ("{% set x = 'a' * 300000 %}{{ x | trim('b' * 150000 ~ 'a') }}", TOO_MUCH),
    "comparing long texts": (
        "{% set x = 'a' * 999999 %}{% set y = x ~ 'a' %}{% for i in range(9999) %}{{ x in y }}{% endfor %}",
        TOO_MUCH,
    ),
    "slices": ("{% set x = 'a' * 999999 %}{% for i in range(9999) %}{% set y = x[1:] %}{% endfor %}", TOO_MUCH),
    "formats": ("{{ '%999999999d' % 1 }}", "% is not offered"),
    "other formats": ("{{ '{:999999999}'.format(1) }}", "str.format is not offered"),
    "formats in a Markup": ("{{ ('{:999999999}' | safe).format(1) }}", "Markup.format is not offered"),
    "methods got by filters": ("{{ ('a' | attr('center'))(10 ** 9) }}", "str.center is not offered"),
    "widths": ("{{ 'a'.zfill(10 ** 9) }}", "str.zfill is not offered"),
    "bytes": ("{{ (1).to_bytes(10 ** 9, 'big') }}", "int.to_bytes is not offered"),
    "filters not offered": ("{{ 'a' | center(10 ** 9) }}", "center"),
    "text made up": ("{{ lipsum(10 ** 9) }}", "lipsum"),
    "other files": ("{% include 'x' %}", "include is not offered"),
    "expressions computed early": ("{% autoescape 9 ** 9 ** 9 %}{% endautoescape %}", "is not offered"),
    "many blocks": ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "nested"),
    "much nesting": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "recursion"),
    "length": ("x" * 65_537, "65,537 characters"),
    "the time": ("{{ strftime_now('%c' * 999) }}", "256 characters"),
    "endless macros": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
    "long reasons": ("{{ raise_exception('no! ' * 9999) }}", r"^no! (no! ?){2,124}$"),
    "a hidden attribute": ("{% set ns = namespace() %}{% set ns._x = 1 %}", "underscore"),
    "Python's own": ("{{ ''.__class__.__mro__ }}", "unsafe"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_by_a_limit(name: str) -> None:
    template, reason = BOMBS[name]
    with pytest.raises(ChatTemplateError, match=reason):
        bounded(template)


def test_a_meter_is_of_one_render() -> None:
    template = f"{{% for i in range({MAX_UNITS // 40}) %}}{{% endfor %}}"
    for _ in range(30):
        assert bounded(template) == ""
