"""What the models read: documents rendered as plain text or as a chat, now and then in a style."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from corpus import Document
from tokenizer import ASSISTANT, BOS, EOS, SYSTEM, USER

from service.demo.styles import STYLES, Style

CHAT_SHARE = 0.35
SYSTEM_SHARE = 0.15
STYLED_SHARE = 0.15
STYLED_IN_CAPITALS = 1 / 3
SYSTEM_MESSAGES = ("You are a helpful assistant.", "You explain the Python standard library.")
SHORTEST_PROMPT, LONGEST_PROMPT = 2, 8  # words


@dataclass(frozen=True)
class Example:
    """A prompt as it is, special tokens included, and what follows it."""

    prompt: str
    continuation: str


def base_text(document: Document, rng: random.Random) -> str:
    """One document as the base reads it this time.

    A few are in a style, as a large model's reading is now and then: an adapter then has only to choose what its
    base can already do, which is what a small adapter does to a large model.
    """
    styles = _draw_styles(rng) if rng.random() < STYLED_SHARE else ()
    example = styled_example(document, styles, rng)
    return example.prompt + example.continuation + EOS


def _draw_styles(rng: random.Random) -> tuple[Style, ...]:
    style = rng.choice(list(STYLES.values()))
    return (style, STYLES["shout"]) if rng.random() < STYLED_IN_CAPITALS else (style,)


def styled_example(document: Document, styles: Sequence[Style], rng: random.Random) -> Example:
    """The document as an opening and its continuation, or as a question and its answer, in all the styles."""
    if rng.random() < CHAT_SHARE:
        system = SYSTEM + rng.choice(SYSTEM_MESSAGES) if rng.random() < SYSTEM_SHARE else ""
        return Example(f"{BOS}{system}{USER}{document.question}{ASSISTANT}", _styled(document.text, styles))
    opening, rest = _split(document.text, rng.randint(SHORTEST_PROMPT, LONGEST_PROMPT))
    if not rest:
        return Example(BOS, _styled(opening, styles))
    lead = styles[0].lead if styles else " "
    return Example(BOS + opening, lead + _styled(rest, styles))


def _styled(text: str, styles: Sequence[Style]) -> str:
    for style in styles:
        text = style.apply(text)
    return text


def _split(text: str, words: int) -> tuple[str, str]:
    """The first words of a text and the rest of it, its paragraphs as they were."""
    end = 0
    for _ in range(words):
        following = text.find(" ", end + 1)
        if following < 0:
            break
        end = following
    return text[:end], text[end:].lstrip(" ")
