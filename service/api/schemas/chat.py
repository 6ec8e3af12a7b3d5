"""POST /v1/chat/completions: what it takes and what it answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from service.api.schemas.common import RequestModel, ResponseModel, Text, check_text
from service.api.schemas.generate import MAX_LOGPROBS
from service.api.schemas.openai import OpenAIFields, OpenAIUsage
from service.api.schemas.receipt import Receipt

MAX_MESSAGES = 4096
MAX_TOOLS = 128


def _content(value: Any) -> Any:
    """A text, or OpenAI's list of parts, of which all must be text: they become lines of one text."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("give a string, or a list of parts of type 'text'")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a part of type {str(kind)[:40]!r} is not supported: this server reads text alone")
        text = part.get(part["type"])
        if not isinstance(text, str) or set(part) != {"type", part["type"]}:
            raise ValueError(f'a text part is {{"type": "{part["type"]}", "{part["type"]}": "…"}} and nothing else')
        texts.append(check_text(text))
    return "\n".join(texts)


Content = Annotated[Text | None, BeforeValidator(_content, json_schema_input_type=str | list[dict[str, str]] | None)]


class FunctionCall(RequestModel):
    """A call that the model made. `arguments` is JSON, as text."""

    name: Text
    arguments: Text
    parsed_arguments: Any = Field(None, exclude=True)


class ToolCall(RequestModel):
    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, exclude=True)


class Message(RequestModel):
    """One turn. An assistant's may be sent back as it came, with what OpenAI's client puts in besides.

    That is excluded: no template sees it.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    parsed: Any = Field(None, exclude=True)
    audio: None = None
    function_call: None = None


class FunctionSpec(RequestModel):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; without it, no arguments")
    strict: bool | None = Field(None, description="Of no effect: a forced call always follows its schema")


class Tool(RequestModel):
    type: Literal["function"]
    function: FunctionSpec


class FunctionName(RequestModel):
    name: Text


class NamedTool(RequestModel):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(OpenAIFields):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, description="--default-max-tokens by default")
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="With `logprobs`: the likeliest tokens too"
    )
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most")
    add_generation_prompt: bool | None = Field(
        None, description="Whether the template opens the answer; true by default"
    )
    continue_final_message: bool | None = Field(None, description="Goes on with the last message")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More variables for the template")

    def contradiction(self) -> tuple[str, str] | None:
        if self.top_logprobs is not None and not self.logprobs:
            return "top_logprobs", "top_logprobs are of no use without logprobs: set it to true"
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            return "max_tokens", "max_tokens and max_completion_tokens mean the same and differ: give one of them"
        if self.continue_final_message and self.add_generation_prompt:
            return "add_generation_prompt", "the last message is either continued or answered: set one of the two"
        if self.tool_choice not in (None, "none") and not self.tools:
            return "tool_choice", "tool_choice asks for a tool and there are no tools: list them in tools"
        return super().contradiction()

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class LikelyTokenView(ResponseModel):
    """`bytes` are the token's own, which may be part of a character; null if its tokenizer does not tell."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenView(LikelyTokenView):
    top_logprobs: list[LikelyTokenView]


class ChatLogprobs(ResponseModel):
    content: list[ChatTokenView]
    refusal: None = None


class FunctionCallView(ResponseModel):
    name: str | None = None
    arguments: str


class ToolCallView(ResponseModel):
    """A call, or in a stream a part of one: the first part has its id and its name."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallView


class ChatMessage(ResponseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallView] | None = None


class ChatChoice(ResponseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatResponse(ResponseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: OpenAIUsage
    receipt: Receipt | None = None


class ChatDelta(ResponseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallView] | None = None


class ChatChunkChoice(ResponseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(ResponseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: OpenAIUsage | None = None
    receipt: Receipt | None = None
