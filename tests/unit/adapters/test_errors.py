"""What errors carry stays short, whatever was in a stranger's file."""

from __future__ import annotations

from adapters.errors import LONGEST_MESSAGE, LONGEST_SUBJECT, BadConfig


def test_short_ones_are_kept_to_the_character():
    error = BadConfig("x" * LONGEST_MESSAGE, subject="s" * LONGEST_SUBJECT)
    assert (error.message, error.subject) == ("x" * LONGEST_MESSAGE, "s" * LONGEST_SUBJECT)
    assert BadConfig("x").subject is None


def test_long_ones_keep_what_is_wrong_and_what_to_do():
    error = BadConfig("r is " + "x" * 10**6 + "; it must be a number", subject="y" * 10**6)
    assert error.message.startswith("r is xxx")
    assert error.message.endswith("xxx; it must be a number")
    assert len(error.message) <= LONGEST_MESSAGE
    assert len(error.subject or "") <= LONGEST_SUBJECT
    assert str(error) == error.message
