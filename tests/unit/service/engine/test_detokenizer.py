from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.detokenizer import TextStream


class Bytes:
    """A byte is a token."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class Words:
    """A token is a word with the space before it, which is left out at the beginning (SentencePiece)."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" {chr(i)}" for i in ids)[1:]


def stream(text: str, stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """What is shown after each byte of `text` until a stop string ends it, and at the end."""
    out = TextStream(Bytes(), stop)
    shown = []
    for byte in text.encode():
        shown.append(out.push(byte))
        if out.stopped:
            return shown, out
    return [*shown, out.finish()], out


def test_text_comes_as_it_is_made() -> None:
    shown, _ = stream("abc")
    assert shown == ["a", "b", "c", ""]


def test_no_half_characters() -> None:
    shown, _ = stream("aé€😀z")
    assert [piece for piece in shown if piece] == ["a", "é", "€", "😀", "z"]


def test_an_incomplete_character_is_shown_as_such_at_the_end() -> None:
    out = TextStream(Bytes())
    assert out.push(0xE2) == ""
    assert out.finish() == "\ufffd"


def test_a_word_that_follows_others_keeps_its_space() -> None:
    words = [*map(ord, "abcdefghij")]
    assert [TextStream(Words(), before=words[:i]).push(words[i]) for i in range(10)] == [
        "a",
        *(f" {c}" for c in "bcdefghij"),
    ]


@pytest.mark.parametrize("before", ["", "x", "é", "xx😀", "😀😀😀"])
def test_what_precedes_a_text_is_no_part_of_it(before: str) -> None:
    out = TextStream(Bytes(), ["STOP"], list(before.encode()))
    assert "".join(out.push(byte) for byte in "aé😀STOP".encode()) == "aé😀"
    assert out.stopped
    assert TextStream(Bytes(), before=list(before.encode())).finish() == ""


@pytest.mark.parametrize("stop", [["STOP"], ["nope", "STOP"], ["STOP", "TOP"]])
def test_a_stop_string_and_what_follows_is_never_shown(stop: list[str]) -> None:
    shown, out = stream("abSTOPcd", stop)
    assert "".join(shown) == ("abS" if "TOP" in stop and "STOP" not in stop else "ab")
    assert out.stopped


def test_the_earliest_stop_string_wins() -> None:
    shown, _ = stream("a--b==c", ["==", "--"])
    assert "".join(shown) == "a"


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_not_one() -> None:
    shown, out = stream("aSTx", ["STOP"])
    assert shown == ["a", "", "", "STx", ""]
    assert not out.stopped


def test_an_unfinished_stop_string_is_shown_at_the_end() -> None:
    shown, out = stream("aST", ["STOP"])
    assert "".join(shown) == "aST"
    assert not out.stopped


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_shown_text_is_the_text_up_to_the_first_stop_string(text: str, stop: list[str]) -> None:
    shown, out = stream(text, stop)
    ends = [end for end in (text.find(s) for s in stop) if end >= 0]
    joined = "".join(shown)
    assert out.stopped == bool(ends)
    if not ends:
        assert joined == text
    else:
        # Streaming ends at the stop string that is complete first, whose beginning may come later than another's.
        first_complete = min(text.find(s) + len(s) for s in stop if s in text)
        assert joined == text[: min(text.find(s) for s in stop if s in text[:first_complete])]
