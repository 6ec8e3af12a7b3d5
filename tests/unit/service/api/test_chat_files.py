"""The files with which an adapter writes chats its own way: what is read from them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import BadConfig
from service.api.chat_files import chat_template_of, check_chat_files
from service.engine.template_sandbox import MAX_TEMPLATE_CHARACTERS

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"


def write_config(directory: Path, value: Any) -> None:
    (directory / CONFIG).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"chat_template": "a"}, "a"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, "d"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}]}, None),
        ({"chat_template": []}, None),
        ({"chat_template": None}, None),
        ({"bos_token": "<s>"}, None),
    ],
)
def test_the_template_of_a_tokenizers_configuration(tmp_path: Path, config: Any, expected: str | None) -> None:
    write_config(tmp_path, config)
    check_chat_files(tmp_path)
    assert chat_template_of(tmp_path) == expected


def test_the_template_of_its_own_file_comes_first(tmp_path: Path) -> None:
    write_config(tmp_path, {"chat_template": "a"})
    (tmp_path / TEMPLATE).write_text("b é")
    assert chat_template_of(tmp_path) == "b é"


def test_no_files_no_template(tmp_path: Path) -> None:
    check_chat_files(tmp_path)
    assert chat_template_of(tmp_path) is None


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'x' %}{% break %}{% endif %}{{ m['content'] | tojson }}{% endfor %}",
        "{% generation %}{{ messages }}{% endgeneration %}",
        "{{ raise_exception('no') }}{{ strftime_now('%Y') }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",  # parsed, never computed
        "",
    ],
)
def test_what_transformers_renders_is_taken(tmp_path: Path, template: str) -> None:
    (tmp_path / TEMPLATE).write_text(template)
    check_chat_files(tmp_path)


@pytest.mark.parametrize("file", [TEMPLATE, CONFIG])
def test_a_template_that_is_no_jinja_names_the_line(tmp_path: Path, file: str) -> None:
    template = "one\n{% if x %}\n{{ y }\n"
    if file == CONFIG:
        write_config(tmp_path, {"chat_template": [{"name": "default", "template": template}]})
    else:
        (tmp_path / TEMPLATE).write_text(template)
    with pytest.raises(BadConfig, match=r"not valid Jinja: line 3: ") as caught:
        check_chat_files(tmp_path)
    assert caught.value.subject == file


def test_a_template_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / TEMPLATE).write_text("{{ " + "(" * 50_000 + " }}")
    with pytest.raises(BadConfig, match="nested too deeply"):
        check_chat_files(tmp_path)


def test_a_template_that_is_too_long(tmp_path: Path) -> None:
    (tmp_path / TEMPLATE).write_text("x" * (MAX_TEMPLATE_CHARACTERS + 1))
    with pytest.raises(BadConfig, match="65,537 characters"):
        check_chat_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "must hold a JSON object"),
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"\xff", "is not UTF-8"),
        (b'{"chat_template": 1}', "must be a text, or a list"),
        (b'{"chat_template": [{"name": "default"}]}', "must be a text, or a list"),
        (b'{"chat_template": {"default": "x"}}', "must be a text, or a list"),
    ],
)
def test_a_configuration_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(BadConfig, match=message) as caught:
        check_chat_files(tmp_path)
    assert caught.value.subject == CONFIG
    with pytest.raises(BadConfig):
        chat_template_of(tmp_path)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / TEMPLATE).write_bytes(b"\xff")
    with pytest.raises(BadConfig, match="is not UTF-8"):
        check_chat_files(tmp_path)
