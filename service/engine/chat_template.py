"""Chats rendered through templates that come with adapters, as transformers renders them, within limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Template

from service.engine.template_meter import TemplateLimit, metered
from service.engine.template_sandbox import compile_template

MAX_OUTPUT_CHARACTERS = 8 << 20
_TEMPLATES_KEPT = 32
_LONGEST_REASON = 500
_CONTINUED_HERE = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that it goes by; templates read the first two


class ChatTemplateError(ValueError):
    """A chat template cannot be rendered for these messages; the message says what it says."""


def render_bounded(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: Mapping[str, Any],
) -> str:
    """The conversation as text. `variables` has the tokenizer's special tokens too; all values are plain JSON.

    Raises ChatTemplateError for whatever goes wrong: a stranger wrote the template, and its faults are not ours.
    """
    chat = [_as_template_reads(message) for message in messages]
    final = _mark_final(template, chat) if continue_final_message else None
    try:
        with metered():
            text = _render(_compiled(template), {
                "messages": chat,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **variables,
            })  # fmt: skip
    except Exception as error:
        reason = " ".join(str(error)[: 2 * _LONGEST_REASON].split())[:_LONGEST_REASON]
        raise ChatTemplateError(reason or type(error).__name__) from error
    return text if final is None else _cut_at_mark(text, final)


@lru_cache(_TEMPLATES_KEPT)
def _compiled(template: str) -> Template:
    return compile_template(template)


def _render(template: Template, variables: Mapping[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(variables):
        length += len(piece)
        if length > MAX_OUTPUT_CHARACTERS:
            raise TemplateLimit(f"it writes more than {MAX_OUTPUT_CHARACTERS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def _as_template_reads(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null; reasoning by both names that templates know."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in _REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _mark_final(template: str, chat: Sequence[dict[str, Any]]) -> str:
    """Marks where the last message ends; returns its text."""
    if "content" not in template:
        raise ChatTemplateError("it does not read the content of messages: none can be continued")
    final: str = chat[-1]["content"]
    chat[-1]["content"] = final + _CONTINUED_HERE
    return final


def _cut_at_mark(text: str, final: str) -> str:
    """What comes before the mark. A template that trims messages has trimmed the mark's end, but not the message's."""
    at = text.rfind(_CONTINUED_HERE.strip())
    if at < 0 or final.strip() not in text:
        raise ChatTemplateError("it leaves out the final message, or a part of it: it cannot be continued")
    return text[:at] if text.startswith(_CONTINUED_HERE, at) else text[:at].rstrip()
