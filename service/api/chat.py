"""From messages to the text that the model continues: through the tokenizer's chat template, or the adapter's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from adapters.store import Store
from service.api.adapter_files import unless_deleted
from service.api.chat_files import chat_template_of
from service.api.deps import ServerState
from service.api.errors import ApiError
from service.api.schemas.chat import Message, Tool
from service.engine.chat_template import ChatTemplateError
from service.engine.selection import Selection

_TEMPLATES_KEPT = 256

# What a request may not slip into a template's variables.
_RESERVED = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
    }
    | {"tokenize", "return_tensors", "return_dict", "padding", "truncation", "max_length", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask", "load_audio_from_video", "processor_kwargs"}
)


def render_chat(
    state: ServerState,
    template: str | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The conversation's token ids, by `template` or the tokenizer's own, which alone adds special tokens.

    Raises ApiError if there is none, or if it refuses the messages.
    """
    if template is None and state.tokenizer.chat_template is None:
        raise ApiError(
            "invalid_request",
            "neither the base model's tokenizer nor the adapter has a chat template: use /v1/completions, or upload "
            "the adapter with its chat_template or tokenizer_config",
            param="messages",
        )
    if clash := sorted(_RESERVED & set(variables or {})):
        raise ApiError(
            "invalid_request",
            f"chat_template_kwargs may not set {clash[0]!r}: leave it out",
            param="chat_template_kwargs",
        )
    try:
        text = state.tokenizer.render_chat(
            [_as_template_reads(message) for message in messages],
            template=template,
            tools=None if tools is None else [tool.model_dump(exclude_unset=True) for tool in tools],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables or {},
        )
    except ChatTemplateError as error:
        raise ApiError(
            "invalid_request", f"the chat template does not take these messages: {error}", param="messages"
        ) from error
    return state.tokenizer.encode(text, add_special_tokens=False)


def template_of(state: ServerState, selection: Selection) -> str | None:
    """The adapters' own template, None if they bring none. Reads the store.

    Raises ApiError if a blend's adapters bring different ones, AdapterNotFound if one has been deleted meanwhile.
    """
    found = {_stored_template(state.store, adapter.digest) for adapter in selection.adapters} - {None}
    if len(found) > 1:
        raise ApiError(
            "invalid_request",
            "the blend's adapters bring different chat templates: use /v1/completions, with the prompt written out",
            param="adapters",
        )
    return next(iter(found), None)


@lru_cache(_TEMPLATES_KEPT)
def _stored_template(store: Store, digest: str) -> str | None:
    """What is stored under a digest never changes, but it may go, and come back: only what is there is remembered."""
    with store.reading(digest) as directory, unless_deleted(directory):
        return chat_template_of(directory)


def _as_template_reads(message: Message) -> dict[str, Any]:
    """Templates know no developers, and take arguments as objects."""
    fields = message.model_dump(exclude_none=True, exclude={"refusal", "annotations"})
    fields.setdefault("content", message.refusal or "")
    if message.role == "developer":
        fields["role"] = "system"
    for call in fields.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return fields


def _arguments(text: str) -> Any:
    try:
        return json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise ApiError("invalid_request", f"a tool call's arguments are not JSON: {error}", param="messages") from error
