"""What the engine refuses at submission.

    EngineError
    ├── InvalidRequest           a prompt or a parameter that cannot be run
    │   └── TooManyChoices       more than the queue takes
    ├── WrongTask                this server was started for another task
    ├── ContextLengthExceeded    prompt and new tokens do not fit the context
    │   ├── PromptTooLong        for an encoder
    │   └── OutputTooLong        for a decoder beside one
    ├── Overloaded               the queue is full; `retry_after_s` says when to come back
    └── EngineUnavailable        loading, draining, or its thread has died

Like AdapterError they carry facts; `code` is the error envelope's code and `param` the request's field.
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(EngineError):
    code = "invalid_request"


class TooManyChoices(InvalidRequest):
    """More than the queue takes, even if it is empty."""

    def __init__(self, *, choices: int, max_queue: int) -> None:
        self.choices = choices
        self.max_queue = max_queue
        super().__init__(self.describe(), param="n")

    def describe(self, choices: str = "choices, its prompts times n,") -> str:
        """The message, with the client's word for what there is too much of."""
        return (
            f"the request asks for {self.choices} {choices} and the queue of this server takes {self.max_queue} "
            "(--max-queue): ask for fewer, or send several requests"
        )


class WrongTask(EngineError):
    code = "wrong_task"

    def __init__(self, asked: str, started_for: str) -> None:
        super().__init__(
            f"this server was started with --task {started_for} and does not {asked}: send the request to one that was "
            f"started with --task {asked}"
        )


class ContextLengthExceeded(EngineError):
    code = "context_length_exceeded"
    about: ClassVar[str] = "prompt"  # the field to change

    def __init__(self, prompt_tokens: int, max_new_tokens: int, context: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.context = context
        super().__init__(self.describe(), param=self.about)

    def describe(self, prompt: str = "prompt", max_new_tokens: str = "max_new_tokens") -> str:
        """The message, with the names that a client has for the two."""
        return (
            f"the context of {self.context} tokens does not hold the {self.prompt_tokens} of the {prompt} and "
            f"{self.max_new_tokens} more ({max_new_tokens}): shorten the {prompt} or ask for fewer tokens"
        )


class PromptTooLong(ContextLengthExceeded):
    """More than an encoder reads; `context` is what it does."""

    def describe(self, prompt: str = "prompt", max_new_tokens: str = "max_new_tokens") -> str:
        return (
            f"the encoder reads at most {self.context} tokens and the {prompt} has {self.prompt_tokens}: shorten the "
            f"{prompt}"
        )


class OutputTooLong(ContextLengthExceeded):
    """More than a decoder writes, whatever the prompt; `context` is what it does."""

    about = "max_new_tokens"

    def describe(self, prompt: str = "prompt", max_new_tokens: str = "max_new_tokens") -> str:
        return (
            f"the decoder writes at most {self.context} tokens and {max_new_tokens} is {self.max_new_tokens}: ask for "
            "fewer tokens"
        )


class Overloaded(EngineError):
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailable(EngineError):
    code = "engine_unavailable"
