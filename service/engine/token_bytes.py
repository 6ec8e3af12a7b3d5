"""The bytes that a token stands for, where its spelling tells: a token may be part of a character."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's spelling of a byte that is no token's text


class TokenBytes:
    """Reads spellings as a fast tokenizer's decoder does: byte-level (GPT-2's), or SentencePiece's with bytes.

    `of` returns None if the decoder is neither.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        steps = [] if backend is None or backend.decoder is None else list(_steps(json.loads(_state(backend.decoder))))
        self._byte_level = any(step["type"] == "ByteLevel" for step in steps)
        self._byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
        self._replaced = [replaced for replaced in map(_replacement, steps) if replaced is not None]

    def of(self, spelling: str) -> bytes | None:
        if self._byte_level:
            if all(character in _BYTE_OF for character in spelling):
                return bytes(_BYTE_OF[character] for character in spelling)
            return spelling.encode()  # an added token, spelled as it reads
        if not self._byte_fallback:
            return None
        if byte := _BYTE.fullmatch(spelling):
            return bytes([int(byte[1], 16)])
        for old, new in self._replaced:
            spelling = spelling.replace(old, new)
        return spelling.encode()


def _state(decoder: Any) -> bytes:
    """The decoder's configuration in JSON."""
    state: bytes = decoder.__getstate__()
    return state


def _steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _replacement(step: Mapping[str, Any]) -> tuple[str, str] | None:
    match step:
        case {"type": "Metaspace", "replacement": old}:
            return old, " "
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return old, new
    return None


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte: itself if it can be seen, else one of those from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in visible else next(others)): byte for byte in range(256)}


_BYTE_OF = _alphabet()
