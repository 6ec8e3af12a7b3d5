"""multipart/form-data, read as it arrives: the parser's callbacks as parts that are opened, written and closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.api.errors import ApiError

_MAX_HEADER_BYTES = 4096  # of all headers of one part
_MAX_SURROUNDING_BYTES = 4096  # before the first boundary and after the last, where nothing means anything


class Part(Protocol):
    """Where one part's bytes go. It ends with `complete`, or with `abandon` when the rest does not come."""

    def write(self, data: bytes) -> None: ...

    def complete(self) -> None: ...

    def abandon(self) -> None: ...


class FormReader:
    """Feeds the parts of one form, one after the other, to what `open_part` gives for their names.

    `open_part` and the parts may raise; the form is then to be closed and forgotten.
    """

    def __init__(self, content_type: str, open_part: Callable[[str], Part]) -> None:
        self._open_part = open_part
        self._part: Part | None = None
        self._field, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._header_bytes = 0
        self._surrounding_bytes = 0
        self._begun = self._complete = False
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise malformed("its Content-Type names no boundary")
        try:
            self._parser = MultipartParser(boundary, self._callbacks())
        except FormParserError as error:
            raise malformed(str(error)) from error

    def feed(self, chunk: bytes) -> None:
        had_ended = self._complete
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise malformed(str(error)) from error
        if had_ended or not self._begun:
            self._surrounding_bytes += len(chunk)
            if self._surrounding_bytes > _MAX_SURROUNDING_BYTES:
                raise malformed(f"it has more than {_MAX_SURROUNDING_BYTES:,} bytes around its parts")

    def finish(self) -> None:
        """Raises ApiError unless the form came to its end."""
        if not self._complete:
            raise malformed("it ends before its last boundary")

    def close(self) -> None:
        """Abandons a part that is still open."""
        if self._part is not None:
            part, self._part = self._part, None
            part.abandon()

    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._grow(self._field, data[start:end]),
            "on_header_value": lambda data, start, end: self._grow(self._value, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._write,
            "on_part_end": self._complete_part,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._begun = True
        self._disposition = b""
        self._header_bytes = 0

    def _grow(self, buffer: bytearray, data: bytes) -> None:
        buffer += data
        self._header_bytes += len(data)
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise malformed(f"a part's header is longer than {_MAX_HEADER_BYTES:,} bytes")

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _open(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name", b"")
        self._part = self._open_part(name.decode("utf-8", "replace"))

    def _write(self, data: bytes, start: int, end: int) -> None:
        assert self._part is not None
        self._part.write(data[start:end])

    def _complete_part(self) -> None:
        assert self._part is not None
        part, self._part = self._part, None
        part.complete()

    def _end(self) -> None:
        self._complete = True


def malformed(why: str) -> ApiError:
    return ApiError("invalid_request", f"the multipart form cannot be read: {why}; send multipart/form-data")
