"""POST /tokenize and /detokenize: what they take and what they answer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from service.api.schemas.chat import MAX_MESSAGES, MAX_TOOLS, Message, Tool
from service.api.schemas.common import RequestModel, ResponseModel, Text
from service.api.schemas.generate import SelectionFields


class TokenizeRequest(SelectionFields):
    """Either a prompt or messages. The selection matters where an adapter brings a chat template of its own."""

    model: Text | None = Field(None, description="As in /v1/chat/completions")
    prompt: Text | None = Field(None, examples=["The default value is"])
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = Field(
        None, description="True by default for a prompt. Messages get theirs from the template alone"
    )
    return_token_strs: bool | None = Field(None, description="The tokens as the vocabulary spells them, too")
    add_generation_prompt: bool | None = Field(None, description="Whether the template opens an answer; by default")
    continue_final_message: bool | None = Field(None, description="Leaves the last message open")
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More variables for the template")

    def contradiction(self) -> tuple[str, str] | None:
        """(the field, what is wrong and what to do) if the fields, each valid, do not go together."""
        if (self.prompt is None) == (self.messages is None):
            return "prompt", "give either a prompt or messages"
        if self.messages is not None and self.add_special_tokens:
            return "add_special_tokens", "the chat template adds the special tokens: leave add_special_tokens out"
        if self.continue_final_message and self.add_generation_prompt:
            return "add_generation_prompt", "the last message is either continued or answered: set one of the two"
        chat_only = [name for name in _CHAT_ONLY if getattr(self, name) is not None]
        if self.prompt is not None and chat_only:
            return chat_only[0], f"{chat_only[0]} is for messages: leave it out beside a prompt"
        return None


_CHAT_ONLY = ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs")


class TokenizeResponse(ResponseModel):
    """`max_model_len` is the context: the most tokens that prompt and output may have together."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestModel):
    model: Text | None = Field(None, description="Accepted, and of no effect: all share one vocabulary")
    tokens: list[Annotated[int, Field(ge=0)]]


class DetokenizeResponse(ResponseModel):
    prompt: str
