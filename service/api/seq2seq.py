"""What a server of encoder-decoders has to refuse in requests for text."""

from __future__ import annotations

from typing import Protocol

from service.api.deps import ServerState
from service.api.errors import ApiError
from service.api.schemas.receipt import ReceiptWanted
from service.engine.task import Task


class _Asked(Protocol):
    @property
    def echo(self) -> bool | None: ...

    @property
    def receipt(self) -> ReceiptWanted | None: ...


def check_offered(state: ServerState, body: _Asked) -> None:
    """Raises ApiError for what has no meaning where an encoder reads the prompt, or is not offered there."""
    if state.task is not Task.SEQ2SEQ:
        return
    if body.echo:
        raise ApiError(
            "invalid_request",
            "with --task seq2seq an output does not continue its prompt, and the prompt's tokens have no "
            "probabilities: leave echo out",
            param="echo",
        )
    if body.receipt:
        raise ApiError(
            "invalid_request",
            "there are no receipts with --task seq2seq: replay recomputes texts that continue their prompts",
            param="receipt",
        )
