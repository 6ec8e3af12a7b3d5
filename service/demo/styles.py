"""The writing styles of the demo's adapters: how a text is put into one, and how much a text is in one.

Training styles its examples with `apply`; the demo and the tests measure what a model wrote with `score`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

WORDS_PER_BULLET = 6
LONGEST_BULLET = 2 * WORDS_PER_BULLET

_LONE_DASH = re.compile(r"(?<!\S)-(?!\S)")
_BETWEEN_WORDS = re.compile(r"[\W_]+")
_QUOTED_WORD = re.compile(r'"[^"\s]+"')


@dataclass(frozen=True)
class Style:
    """One way to write: `apply` rewrites a plain text, `score` says in [0, 1] how much a text is so written.

    `lead` is what stands between a prompt, which stays as it is, and its continuation in the style.
    """

    name: str
    description: str
    apply: Callable[[str], str]
    score: Callable[[str], float]
    lead: str = " "

    def continuation(self, text: str) -> str:
        """The text as it follows a prompt: in the style, after the style's lead."""
        return self.lead + self.apply(text)


def _share(part: int, whole: int) -> float:
    return min(1.0, part / whole) if whole > 0 else 0.0


def _is_word(piece: str) -> bool:
    return any(character.isalnum() for character in piece)


def _apply_dashes(text: str) -> str:
    return " - ".join(_LONE_DASH.sub(" ", text).split())


def _score_dashes(text: str) -> float:
    """Dashes that stand alone, per gap between words."""
    words = sum(_is_word(piece) for piece in text.split())
    return _share(len(_LONE_DASH.findall(text)), words - 1)


def _score_shout(text: str) -> float:
    """The share of capitals among the letters that have a case."""
    capitals = sum(character.isupper() for character in text)
    return _share(capitals, capitals + sum(character.islower() for character in text))


def _apply_snake(text: str) -> str:
    return "_".join(text.split())


def _score_snake(text: str) -> float:
    """Of the gaps between words that hold a space or an underscore, the share with underscores alone."""
    between = [gap for gap in _BETWEEN_WORDS.finditer(text) if gap.start() > 0 and gap.end() < len(text)]
    gaps = [gap.group() for gap in between]
    spaced = sum(any(map(str.isspace, gap)) for gap in gaps)
    joined = sum("_" in gap and not any(map(str.isspace, gap)) for gap in gaps)
    return _share(joined, joined + spaced)


def _apply_bullets(text: str) -> str:
    words = text.split()
    starts = range(0, len(words), WORDS_PER_BULLET)
    return "\n".join("* " + " ".join(words[start : start + WORDS_PER_BULLET]) for start in starts)


def _score_bullets(text: str) -> float:
    """The share of the words that stand in a bulleted line of a bullet's length."""
    lines = [(line.startswith("* "), sum(map(_is_word, line.split()))) for line in text.splitlines()]
    bulleted = sum(words for is_bullet, words in lines if is_bullet and words <= LONGEST_BULLET)
    return _share(bulleted, sum(words for _, words in lines))


def _apply_quoted(text: str) -> str:
    return " ".join(f'"{word}"' for word in text.replace('"', "").split())


def _score_quoted(text: str) -> float:
    """The share of the words that stand in quotation marks of their own."""
    quoted = sum(map(_is_word, _QUOTED_WORD.findall(text)))
    return _share(quoted, sum(map(_is_word, text.split())))


_ALL = (
    Style("dashes", "A dash between every two words.", _apply_dashes, _score_dashes),
    Style("shout", "Every letter a capital.", str.upper, _score_shout),
    Style("snake", "Words joined by underscores.", _apply_snake, _score_snake),
    Style("bullets", "Short lines that begin with an asterisk.", _apply_bullets, _score_bullets, lead="\n"),
    Style("quoted", "Every word in quotation marks.", _apply_quoted, _score_quoted),
)

STYLES: dict[str, Style] = {style.name: style for style in _ALL}
"""The styles by name; every adapter of the demo is named after its style."""

PROMPTS: tuple[str, ...] = (
    "Open a file and",
    "Return a list of",
    "The file object is",
    "The first argument is",
    "If the file does not exist,",
    "The default value is",
)
"""Openings of documentation for a model to continue."""

QUESTIONS: tuple[str, ...] = (
    "What is the logging module?",
    "Explain threading.Thread.",
    "What does json.dumps do?",
)
"""Questions for the chat template."""
