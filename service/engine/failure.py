"""What an exception on the model's thread means: for one request, or for the process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from adapters.errors import AdapterError
from service.engine.fatal import is_fatal
from service.engine.guide import GrammarFailed

log = logging.getLogger(__name__)

BROKEN = "the model answered NaN or infinity; is the adapter or the dtype at fault?"


def failure(error: Exception) -> tuple[str, str]:
    """The error envelope's code and message for an exception that ended a request."""
    if isinstance(error, AdapterError):
        return error.code, error.message
    if isinstance(error, GrammarFailed):
        return "invalid_request", f"the grammar of the output cannot be followed: {error}; ask for a simpler one"
    return "internal_error", "the engine failed on this request; the server's log says why"


@contextmanager
def optional(otherwise: str) -> Iterator[None]:
    """What saves work but is not needed may fail, for want of memory say."""
    try:
        yield
    except Exception as error:
        if is_fatal(error):
            raise
        log.warning("%s: %s", otherwise, error)
