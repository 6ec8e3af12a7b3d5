"""What an adapter may bring to write chats its own way: a chat template, alone or in a tokenizer's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adapters.errors import BadConfig
from service.api.adapter_files import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from service.engine.template_sandbox import MAX_TEMPLATE_CHARACTERS, GenerationTag

_DEFAULT = "default"


def chat_template_of(directory: Path) -> str | None:
    """The chat template among an adapter's files, None if it brings none. Raises BadConfig.

    `chat_template.jinja` comes first, else `chat_template` of tokenizer_config.json: a text, or a list of
    {"name", "template"} of which the one named "default" counts. These are the places where transformers looks.
    """
    template, config = directory / CHAT_TEMPLATE_FILE, directory / TOKENIZER_CONFIG_FILE
    if template.is_file():
        return _text(template)
    return _template_in(_object(config).get("chat_template")) if config.is_file() else None


def check_chat_files(directory: Path) -> None:
    """Raises BadConfig for a tokenizer_config.json that is no JSON object, and for a template that is no Jinja.

    The template is parsed, never compiled: compiling would already compute its constant expressions.
    """
    config = directory / TOKENIZER_CONFIG_FILE
    if config.is_file():
        _check_template(_template_in(_object(config).get("chat_template")), TOKENIZER_CONFIG_FILE)
    if (directory / CHAT_TEMPLATE_FILE).is_file():
        _check_template(_text(directory / CHAT_TEMPLATE_FILE), CHAT_TEMPLATE_FILE)


# As transformers renders chat templates.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
)


def _check_template(template: str | None, file: str) -> None:
    if template is None:
        return
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise BadConfig(
            f"the chat template in {file} has {len(template):,} characters, and may have {MAX_TEMPLATE_CHARACTERS:,}",
            subject=file,
        )
    try:
        _ENVIRONMENT.parse(template)
    except TemplateSyntaxError as error:
        raise BadConfig(
            f"the chat template in {file} is not valid Jinja: line {error.lineno}: {error.message}", subject=file
        ) from error
    except RecursionError as error:
        raise BadConfig(f"the chat template in {file} is nested too deeply", subject=file) from error


def _template_in(value: Any) -> str | None:
    """The template that a tokenizer's configuration gives."""
    match value:
        case None | str():
            return value
        case list() if all(_is_named_template(entry) for entry in value):
            return next((entry["template"] for entry in value if entry["name"] == _DEFAULT), None)
    raise BadConfig(
        f'chat_template in {TOKENIZER_CONFIG_FILE} must be a text, or a list of {{"name", "template"}}',
        subject=TOKENIZER_CONFIG_FILE,
    )


def _is_named_template(entry: Any) -> bool:
    match entry:
        case {"name": str(), "template": str()}:
            return True
    return False


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{path.name} is not valid JSON: {error}", subject=path.name) from error
    if not isinstance(value, dict):
        raise BadConfig(f"{path.name} must hold a JSON object", subject=path.name)
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadConfig(f"{path.name} is not UTF-8", subject=path.name) from error
