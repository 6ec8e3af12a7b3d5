"""The styles: what they write scores 1, plain text and the other styles score near 0."""

import pytest

from service.demo.styles import PROMPTS, QUESTIONS, STYLES, WORDS_PER_BULLET

PLAIN = (
    "the name of the file, if it exists; otherwise raise an OSError. The user's path, which is not read "
    "from the file_name given, may be empty (the default). Return None if there is no such name."
)


@pytest.mark.parametrize("name", STYLES)
def test_a_style_recognises_what_it_wrote(name: str) -> None:
    style = STYLES[name]
    assert style.score(style.continuation(PLAIN)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", STYLES)
def test_a_style_does_not_recognise_plain_text(name: str) -> None:
    assert STYLES[name].score(PLAIN) <= 0.1


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("other", STYLES)
def test_a_style_does_not_recognise_the_others(name: str, other: str) -> None:
    if name != other:
        assert STYLES[name].score(STYLES[other].continuation(PLAIN)) <= 0.1


@pytest.mark.parametrize("name", STYLES)
def test_capitals_go_with_every_style(name: str) -> None:
    text = STYLES["shout"].apply(STYLES[name].continuation(PLAIN))
    assert STYLES[name].score(text) == pytest.approx(1.0)
    assert STYLES["shout"].score(text) == pytest.approx(1.0)


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("text", ["", " ", "\n", "---", "___", '"', "* ", "1"])
def test_scores_stay_in_their_range(name: str, text: str) -> None:
    assert 0.0 <= STYLES[name].score(text) <= 1.0


@pytest.mark.parametrize("name", STYLES)
def test_a_style_keeps_the_words(name: str) -> None:
    words = ["the", "name", "of", "the", "file"]
    styled = STYLES[name].apply(" ".join(words)).lower()
    assert "".join(filter(str.isalpha, styled)) == "".join(words)


def test_half_in_a_style_scores_a_half() -> None:
    assert STYLES["shout"].score("abCD") == pytest.approx(0.5)
    assert STYLES["dashes"].score("a - b c") == pytest.approx(0.5)
    assert STYLES["snake"].score("a_b c") == pytest.approx(0.5)
    assert STYLES["quoted"].score('"a" b') == pytest.approx(0.5)
    assert STYLES["bullets"].score("a b\n* c d") == pytest.approx(0.5)


def test_an_endless_bullet_is_no_bullet() -> None:
    assert STYLES["bullets"].score("* " + "word " * 3 * WORDS_PER_BULLET) == 0.0


def test_names_and_prompts_are_in_order() -> None:
    assert all(name == style.name and style.description for name, style in STYLES.items())
    assert len(set(PROMPTS)) == len(PROMPTS) >= 4
    assert all(prompt == prompt.strip() for prompt in PROMPTS + QUESTIONS)
