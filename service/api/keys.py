"""API keys: whose they are, what they allow, and how much of it.

A key file has one key a line, by its SHA-256 or as it is, followed by what is special about it:

    # key              whose         what for      at most
    sha256:9f86d081…   tenant=acme   scopes=infer  rate=600 concurrency=8 name=ci

`vblora-serve key` makes a key and its line. A key without attributes is the shared tenant's, for everything, without
limits.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from adapters.store import SHARED

log = logging.getLogger(__name__)

_HASHED = "sha256:"
_DIGEST = re.compile(rf"{_HASHED}([0-9a-f]{{64}})")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LIMIT = re.compile(r"[1-9][0-9]{0,8}")
_SHOWN_DIGITS = 8


class KeyFileError(Exception):
    """A key file that cannot be used; the message names the line and never repeats a key."""


class Scope(StrEnum):
    """INFER: generate. ADMIN: add, change and remove adapters. With either one may look."""

    INFER = "infer"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the server knows it: `digest` is its SHA-256 in hex.

    `rate` is in requests a minute, `concurrency` in requests that run at once; None: as many as come.
    """

    digest: str
    tenant: str = SHARED
    scopes: frozenset[Scope] = frozenset(Scope)
    rate: int | None = None
    concurrency: int | None = None
    label: str | None = None

    @property
    def name(self) -> str:
        """What logs call it."""
        return self.label or self.digest[:_SHOWN_DIGITS]

    @classmethod
    def of(cls, key: str, **attributes: object) -> ApiKey:
        """The key as the server knows it."""
        return cls(hash_key(key), **attributes)  # type: ignore[arg-type]


def hash_key(key: str) -> str:
    """A key's SHA-256, in hex. Keys are long and random: nothing slower is needed to keep them from being guessed."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_of(scope: Mapping[str, Any]) -> ApiKey | None:
    """The key that an ASGI request came with; None where none is asked for."""
    key: ApiKey | None = scope.get("state", {}).get("key")
    return key


class KeyRing:
    """The keys that are valid now. `replace` may be called at any time, from any thread."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        """Whether a key is asked for at all."""
        return bool(self._keys)

    def find(self, offered: str) -> ApiKey | None:
        """Compares with every key, in the same time whichever it is."""
        digest, found = hash_key(offered), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def replace(self, keys: Iterable[ApiKey]) -> None:
        self._keys = tuple(keys)


def load_key_file(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file. Blank lines and # comments are passed over. Raises KeyFileError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise KeyFileError(f"the API key file {path} cannot be read: {error}") from error
    keys: dict[str, ApiKey] = {}
    plain = False
    for number, line in enumerate(lines, 1):
        try:
            key = parse_key_line(line)
        except ValueError as error:
            raise KeyFileError(f"line {number} of the API key file {path}: {error}") from error
        if key is None:
            continue
        if key.digest in keys:
            raise KeyFileError(f"line {number} of the API key file {path} has a key that is there already: remove one")
        keys[key.digest] = key
        plain = plain or not line.lstrip().startswith(_HASHED)
    if not keys:
        raise KeyFileError(f"the API key file {path} holds no key; `vblora-serve key` makes one")
    if plain:
        log.warning("the API key file %s holds a key as it is; `vblora-serve key --hash` replaces it by its hash", path)
    if mode & 0o077:
        log.warning("the API key file %s can be read by other users; chmod 600 it", path)
    return tuple(keys.values())


def parse_key_line(line: str) -> ApiKey | None:
    """The key of a line, None if it is blank or a comment. Raises ValueError, whose text does not repeat the key."""
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    match = _DIGEST.fullmatch(words[0])
    if match is None and words[0].startswith(_HASHED):
        raise ValueError("a hashed key is sha256: and 64 digits of hex")
    if match is None and not (words[0].isascii() and words[0].isprintable()):
        raise ValueError("the key has characters that no HTTP header carries; use letters, digits and - . _")
    attributes: dict[str, str] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if not equals or name not in ("name", "tenant", "scopes", "rate", "concurrency") or name in attributes:
            raise ValueError(
                "after a key stand name=, tenant=, scopes=, rate= and concurrency=, each once at most, without spaces"
            )
        attributes[name] = value
    return ApiKey(
        digest=match[1] if match else hash_key(words[0]),
        tenant=_label("tenant", attributes) or SHARED,
        scopes=_scopes(attributes.get("scopes")),
        rate=_limit("rate", attributes),
        concurrency=_limit("concurrency", attributes),
        label=_label("name", attributes),
    )


def _label(name: str, attributes: dict[str, str]) -> str | None:
    value = attributes.get(name)
    if value is not None and not _LABEL.fullmatch(value):
        raise ValueError(f"{name} is 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or a digit")
    return value


def _scopes(text: str | None) -> frozenset[Scope]:
    if text is None:
        return frozenset(Scope)
    try:
        return frozenset(Scope(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"scopes are {' and '.join(Scope)}, with a comma between them") from None


def _limit(name: str, attributes: dict[str, str]) -> int | None:
    value = attributes.get(name)
    if value is None:
        return None
    if not _LIMIT.fullmatch(value):
        raise ValueError(f"{name} is a whole number of at least 1; leave it out for no limit")
    return int(value)
