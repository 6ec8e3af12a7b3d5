"""The kinds of values that settings have: how each is read from text, shown again, and named when the text is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.-]+(:\d{1,5})?|[a-z]+://\[[0-9a-f:]+\](:\d{1,5})?", re.IGNORECASE)
_WHOLE = re.compile(r"\d{1,18}", re.ASCII)
_DIRECTORY = "dir:"
_HUB_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB_PATTERN = re.compile(rf"hf://(\*|{_HUB_WORD}/(\*|{_HUB_WORD}))")
_HUB_TEMPLATE = re.compile(rf"hf://{_HUB_WORD}/[A-Za-z0-9._-]*\*[A-Za-z0-9._-]*")
_BUCKET_PATTERN = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[A-Za-z0-9._=+@/-]*\*?")
_STORE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._=-]+)*/?|file://(/[^/\0]+)+/?")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter to register at start: its name, and the directory, repository or place in a bucket that holds it."""

    name: str
    source: str


@dataclass(frozen=True, slots=True)
class Kind:
    """What a setting's values are. `parse` reads one from text, raising ValueError for text that is not `expected`.

    A configuration file may write the value as text or as one of the types in `toml`.
    """

    expected: str
    parse: Callable[[str], Any]
    metavar: str
    toml: tuple[type, ...] = ()
    show: Callable[[Any], str] = str


def parse_size(text: str) -> int:
    """Bytes from "2GiB", "500 MB" or "1024". Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(text)
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(size: int) -> str:
    """The exact way to write a number of bytes in the largest binary unit: "1GiB"."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def whole(minimum: int, maximum: int | None = None) -> Kind:
    def parse(text: str) -> int:
        value = int(text) if _WHOLE.fullmatch(text) else -1
        if value < minimum or (maximum is not None and value > maximum):
            raise ValueError(text)
        return value

    assert minimum >= 0, "a minus sign is not read"
    limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    return Kind(f"a whole number {limits}", parse, "N", (int,))


def choice(*options: str) -> Kind:
    def parse(text: str) -> str:
        if text not in options:
            raise ValueError(text)
        return text

    return Kind(f"one of {', '.join(options)}", parse, "{" + ",".join(options) + "}")


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return text


def _path(text: str) -> Path:
    return Path(_text(text)).expanduser()


def _bytes(text: str) -> int:
    if (size := parse_size(text)) < 1:
        raise ValueError(text)
    return size


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError(text)
    return _BOOLEANS[text.lower()]


def _allowed_source(text: str) -> Path | str:
    """A directory, or a pattern of repositories of the Hub or of places in a bucket."""
    if "://" not in text:
        return _path(text)
    return _matching(_BUCKET_PATTERN if text.startswith("s3://") else _HUB_PATTERN, text)


def _name_source(text: str) -> Path | str:
    """The directory of `dir:`, or a template of repositories of the Hub."""
    if text.startswith(_DIRECTORY):
        return _path(text.removeprefix(_DIRECTORY))
    return _matching(_HUB_TEMPLATE, text)


def _matching(pattern: re.Pattern[str], text: str) -> str:
    if not pattern.fullmatch(text):
        raise ValueError(text)
    return text


def _show_name_source(source: Path | str) -> str:
    return f"{_DIRECTORY}{source}" if isinstance(source, Path) else source


def _adapter_source(text: str) -> AdapterSource:
    name, _, source = text.partition("=")
    if not (name and source):
        raise ValueError(text)
    return AdapterSource(name, source)


def _store(text: str) -> str:
    if not _STORE.fullmatch(text):
        raise ValueError(text)
    return text.rstrip("/")


def _endpoint(text: str) -> str:
    if not text.startswith(("http://", "https://")) or not _ORIGIN.fullmatch(text):
        raise ValueError(text)
    return text


def _origin(text: str) -> str:
    if text != "*" and not _ORIGIN.fullmatch(text):
        raise ValueError(text)
    return text.lower()


TEXT = Kind("a text that is not empty", _text, "TEXT")
PATH = Kind("a path", _path, "PATH")
BYTES = Kind("a number of bytes such as 512MiB, 2GiB or 1000000", _bytes, "SIZE", (int,), format_size)
SECONDS = Kind("a number of seconds above 0", _seconds, "SECONDS", (int, float), "{:g}".format)
BOOLEAN = Kind("true or false", _boolean, "", (bool,), lambda value: str(value).lower())
ORIGIN = Kind("* or an origin such as https://example.com", _origin, "ORIGIN")
STORE = Kind("s3://bucket, s3://bucket/prefix or file:///directory", _store, "URL")
ENDPOINT = Kind("an address such as https://minio.example:9000", _endpoint, "URL")
ADAPTER = Kind(
    "NAME=DIRECTORY, NAME=hf://org/repo or NAME=s3://bucket/prefix",
    _adapter_source,
    "NAME=SOURCE",
    show=lambda adapter: f"{adapter.name}={adapter.source}",
)
ALLOWED_SOURCE = Kind(
    "a directory, hf://org/repo, hf://org/*, hf://* or s3://bucket/prefix*", _allowed_source, "SOURCE"
)
NAME_SOURCE = Kind("dir:DIRECTORY, hf://org/* or hf://org/prefix-*", _name_source, "SOURCE", show=_show_name_source)
