"""Turns a choice's tokens into text as they come: no half characters, nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_CONTEXT = 6  # tokens looked at of those before a text: a character of four bytes, and two more
REPLACEMENT = "\ufffd"  # what decoding gives for a character whose bytes are not all there


class Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """The text of one choice. `push` takes a token and returns what can be shown; `finish` returns what was held back.

    A tail that might be the beginning of a stop string is held back until it is not; a stop string and what follows it
    are never returned. `before` are the tokens that precede the text, on the last of which may depend what a token
    reads as.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._ids = list(before[-_CONTEXT:])
        self._context = 0  # tokens from here on are decoded together, so that spaces between words are right
        self._shown = len(self._ids)  # tokens up to here are in the text already, or before it
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The new text that can be shown after one more token. Sets `stopped` when a stop string is complete."""
        self._ids.append(token_id)
        before = self._decoder.decode(self._ids[self._context : self._shown])
        now = self._decoder.decode(self._ids[self._context :])
        if len(now) <= len(before) or now.endswith(REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """What is still held back: an unfinished stop string, an incomplete character as U+FFFD."""
        if self.stopped:
            return ""
        before = self._decoder.decode(self._ids[self._context : self._shown])
        rest = self._decoder.decode(self._ids[self._context :])[len(before) :]
        self._shown = len(self._ids)
        return self._release(rest, last=True)

    def _release(self, new: str, *, last: bool = False) -> str:
        text = self._held + new
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = 0 if last else max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """How many last characters of `text` are the beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
