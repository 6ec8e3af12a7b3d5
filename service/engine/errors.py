"""What the engine refuses at submission.

    EngineError
    ├── InvalidRequest           a prompt or a parameter that cannot be run
    ├── ContextLengthExceeded    prompt and new tokens do not fit the context
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


class ContextLengthExceeded(EngineError):
    code = "context_length_exceeded"


class Overloaded(EngineError):
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailable(EngineError):
    code = "engine_unavailable"
