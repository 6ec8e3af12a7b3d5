"""How adapters and their versions are written: names, digests ("sha256:<64 hex>") and prefixes of digests."""

from __future__ import annotations

import re
from collections.abc import Collection

from adapters.errors import InvalidName, InvalidSelection

RESERVED = frozenset({"base"})

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DIGEST_PREFIX = re.compile(r"sha256:[0-9a-f]{8,64}")


def is_name(name: str) -> bool:
    """Whether the grammar allows `name`; reserved names included."""
    return _NAME.fullmatch(name) is not None


def is_digest(digest: str) -> bool:
    """Whether `digest` is one, written in full."""
    return _DIGEST.fullmatch(digest) is not None


def check_name(name: str, reserved: Collection[str] = ()) -> None:
    """Raise InvalidName unless an adapter may be called `name`."""
    if not is_name(name):
        raise InvalidName(
            f"{name[:140]!r} cannot name an adapter: use 1 to 128 letters, digits, '.', '_' and '-', "
            "the first a letter or a digit",
            subject="name",
        )
    if name in RESERVED or name in reserved:
        raise InvalidName(f"{name!r} is reserved for the base model: choose another name", subject="name")


def check_digest(digest: str) -> None:
    """Raise InvalidSelection unless `digest` is written in full."""
    if not is_digest(digest):
        raise InvalidSelection(f"{digest[:80]!r} is not a digest: write sha256:<64 hex digits>", subject="digest")


def check_digest_prefix(prefix: str) -> str:
    """The prefix in lower case; InvalidSelection unless it has 8 to 64 hex digits."""
    lowered = prefix.lower()
    if not _DIGEST_PREFIX.fullmatch(lowered):
        raise InvalidSelection(
            f"{prefix[:80]!r} does not select a version: write sha256: and at least 8 hex digits of its digest",
            subject="digest",
        )
    return lowered
