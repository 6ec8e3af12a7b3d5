"""What one request may ask of an engine, whatever else runs there."""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    OutputTooLong,
    PromptTooLong,
    TooManyChoices,
)
from service.engine.sequence import GenerationRequest, RowLength
from service.engine.task import Task


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """`max_context` in tokens, prompt and output together; `max_queue` in choices accepted and not yet running.

    Where an encoder reads the prompts, `max_context` is for those alone and `max_output` for what a decoder writes.
    """

    max_context: int
    vocabulary: int
    max_queue: int = 256
    task: Task = Task.GENERATE
    max_output: int | None = None

    def check_length(self, length: RowLength) -> None:
        """Raises ContextLengthExceeded."""
        if self.max_output is not None:
            if length.prompt > self.max_context:
                raise PromptTooLong(length.prompt, length.output, self.max_context)
            if length.output > self.max_output:
                raise OutputTooLong(length.prompt, length.output, self.max_output)
        elif length.total > self.max_context:
            raise ContextLengthExceeded(length.prompt, length.output, self.max_context)

    def check_number(self, choices: int) -> None:
        """Raises TooManyChoices for more than can ever wait together."""
        if choices > self.max_queue:
            raise TooManyChoices(choices=choices, max_queue=self.max_queue)

    def check_tokens(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest."""
        biased = (token for token, _ in request.params.logit_bias)
        for what, tokens in (("prompt", request.prompt_ids), ("logit_bias", biased)):
            if not all(0 <= token < self.vocabulary for token in tokens):
                raise InvalidRequest(
                    f"{what} holds a token id outside the vocabulary (0 to {self.vocabulary - 1})", param=what
                )
