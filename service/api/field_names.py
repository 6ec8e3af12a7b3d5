"""What a route's clients call the fields that the engine's refusals are about."""

from __future__ import annotations

from dataclasses import dataclass

from service.api.errors import ApiError
from service.engine.errors import ContextLengthExceeded, EngineError, TooManyChoices


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The engine's own, unless said otherwise."""

    prompt: str = "prompt"
    max_new_tokens: str = "max_new_tokens"
    choices: str = "choices, its prompts times n,"
    n: str = "n"

    def in_clients_words(self, error: EngineError) -> EngineError | ApiError:
        """The refusal, naming the client's fields."""
        if isinstance(error, ContextLengthExceeded):
            param = self.max_new_tokens if error.about == "max_new_tokens" else self.prompt
            return ApiError(error.code, error.describe(self.prompt, self.max_new_tokens), param=param)
        if isinstance(error, TooManyChoices):
            return ApiError(error.code, error.describe(self.choices), param=self.n)
        if error.param == "prompt":
            return ApiError(error.code, error.message, param=self.prompt)
        return error


NATIVE = FieldNames()
