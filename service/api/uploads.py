"""An adapter as it comes over HTTP, written into a staging directory as it arrives.

Nothing of an upload is held in memory but its two short text fields: FastAPI's own form parsing would read the whole
body before a route runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from anyio import to_thread
from fastapi import Request

from adapters.store import check_name
from service.api.adapter_files import FILE_PARTS, MOST_BYTES
from service.api.errors import ApiError
from service.api.multipart import FormReader, Part
from service.engine.selection import Mode

REQUIRED_PARTS = ("name", "config", "weights")
_MAX_TEXT_BYTES = 1024
_ACTIVATE = {"": None, "false": None, "true": Mode.SWITCH, "switch": Mode.SWITCH, "merge": Mode.MERGE}


@dataclass(frozen=True, slots=True)
class Upload:
    """What was asked besides storing the files. `activate` None: leave the active adapter as it is.

    `source` is where the files were fetched from, None if they came with the request.
    """

    name: str
    activate: Mode | None
    source: str | None = None


async def receive_form(request: Request, staged: Path, reserved: Collection[str]) -> Upload:
    """Writes the files of a multipart/form-data body into `staged`.

    Raises ApiError for a form that is not an upload, InvalidName as soon as the name has come, OSError from the disk.
    """
    form = _UploadForm(staged, reserved)
    with closing(FormReader(request.headers["content-type"], form.open_part)) as reader:
        async for chunk in request.stream():
            if chunk:
                await to_thread.run_sync(reader.feed, chunk)  # it writes to the disk
        reader.finish()
    return form.finish()


class _UploadForm:
    """The parts of an upload: which there are, and where each goes."""

    def __init__(self, staged: Path, reserved: Collection[str]) -> None:
        self._staged = staged
        self._reserved = reserved
        self._seen: set[str] = set()
        self._name = ""
        self._activate: Mode | None = None

    def open_part(self, name: str) -> Part:
        if name in self._seen:
            raise _bad_part(f"the form has {name!r} twice: send it once", name)
        self._seen.add(name)
        match name:
            case "name":
                return _TextPart(name, self._take_name)
            case "activate":
                return _TextPart(name, self._take_activate)
        if name in FILE_PARTS:
            file = FILE_PARTS[name]
            return _FilePart(name, self._staged / file, MOST_BYTES.get(file))
        shown = name[:80]
        parts = ", ".join(("name", *FILE_PARTS))
        raise _bad_part(f"the form has an unknown part {shown!r}: it takes {parts} and activate", shown)

    def finish(self) -> Upload:
        if missing := [name for name in REQUIRED_PARTS if name not in self._seen]:
            needed = ", ".join(REQUIRED_PARTS)
            raise _bad_part(f"the form has no {missing[0]!r}: an upload needs {needed}", missing[0])
        return Upload(self._name, self._activate)

    def _take_name(self, name: str) -> None:
        check_name(name, self._reserved)
        self._name = name

    def _take_activate(self, activate: str) -> None:
        if activate not in _ACTIVATE:
            raise _bad_part(f"activate is {activate[:80]!r}; send 'true', 'switch' or 'merge'", "activate")
        self._activate = _ACTIVATE[activate]


class _TextPart:
    """A short text, handed over when it is complete."""

    def __init__(self, name: str, take: Callable[[str], None]) -> None:
        self._name = name
        self._take = take
        self._data = bytearray()

    def write(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > _MAX_TEXT_BYTES:
            raise _bad_part(f"{self._name!r} is longer than {_MAX_TEXT_BYTES:,} bytes: send less", self._name)

    def complete(self) -> None:
        self._take(self._data.decode("utf-8", "replace"))

    def abandon(self) -> None:
        pass


class _FilePart:
    """A staged file. `limit` is the most bytes that it may take, None if only the whole is bounded."""

    def __init__(self, name: str, path: Path, limit: int | None) -> None:
        self._name = name
        self._limit = limit
        self._received = 0
        self._file = open(path, "xb")  # noqa: SIM115 - its end is another call's

    def write(self, data: bytes) -> None:
        self._received += len(data)
        if self._limit is not None and self._received > self._limit:
            raise ApiError(
                "payload_too_large",
                f"{self._name!r} is larger than the {self._limit:,} bytes that it may take",
                param=self._name,
            )
        self._file.write(data)

    def complete(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


def _bad_part(message: str, part: str) -> ApiError:
    return ApiError("invalid_request", message, param=part)
