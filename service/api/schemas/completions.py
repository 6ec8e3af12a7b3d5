"""POST /v1/completions: what it takes and what it answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from service.api.schemas.common import ResponseModel, check_text
from service.api.schemas.generate import MAX_LOGPROBS
from service.api.schemas.openai import OpenAIFields, OpenAIUsage
from service.api.schemas.receipt import Receipt

MAX_PROMPTS = 256


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def _prompts(value: Any) -> Any:
    if isinstance(value, str):
        return check_text(value)
    if _is_token_ids(value):
        return value
    if not isinstance(value, list) or not (all(isinstance(p, str) for p in value) or all(map(_is_token_ids, value))):
        raise ValueError(
            "give a string, a list of token ids, or a list of either (ids are whole numbers of at least 0)"
        )
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"a request takes at most {MAX_PROMPTS} prompts, not {len(value)}: send several requests")
    return [check_text(prompt) if isinstance(prompt, str) else prompt for prompt in value]


Prompts = Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_prompts)]


class CompletionRequest(OpenAIFields):
    prompt: Prompts = Field(description="Text or token ids, or a list of either")
    max_tokens: int | None = Field(None, ge=0, description="16 by default; 0, with `echo`, only reads the prompt")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="0: each token's; more: as many likeliest ones too. With `echo`, of the prompt as well",
    )
    echo: bool | None = Field(None, description="Puts the prompt before each choice")
    best_of: int | None = Field(None, description="Refused unless it is `n`: ask for `n` choices and pick one")
    suffix: str | None = Field(None, description="Refused: nothing here fills in a middle")

    def contradiction(self) -> tuple[str, str] | None:
        if self.best_of is not None and self.best_of != self.choices:
            return "best_of", "best_of is not supported: ask for n choices with logprobs, and pick among them"
        if self.suffix:
            return "suffix", "suffix is not supported: text is continued here, not filled in; leave it out"
        if self.max_tokens == 0 and not self.echo:
            return (
                "max_tokens",
                "max_tokens is 0, which generates nothing: set echo to read the prompt, or ask for more",
            )
        if self.receipt and len(self.prompts) > 1:
            return "receipt", "a receipt is for one prompt: send a request for each"
        return super().contradiction()

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class CompletionLogprobs(ResponseModel):
    """By token, the prompt's first if it is echoed; the first of these has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class CompletionResponse(ResponseModel):
    """An answer, or one event of a stream. Choice i of prompt p has the index p · n + i."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: OpenAIUsage | None = None
    receipt: Receipt | None = None
