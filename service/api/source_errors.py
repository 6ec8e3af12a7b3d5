"""What can be wrong with a source that an adapter is to be taken from."""

from __future__ import annotations

from service.api.errors import ApiError


class SourceNotFound(ApiError):
    """There is no adapter at the source: no such directory or repository, or one without an adapter_config.json."""

    def __init__(self, message: str) -> None:
        super().__init__("invalid_request", message, param="source")


def bad_source(message: str) -> ApiError:
    return ApiError("invalid_request", message, param="source")


def too_large(name: str, size: int, limit: str) -> ApiError:
    """`limit` says what bounds the file or the whole: "--max-upload allows for an adapter"."""
    return ApiError("payload_too_large", f"{name} takes {size:,} bytes: more than {limit}", param="source")
