"""The replay of one choice over logits that the test makes: where it ends, and what it finds to differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from service.api.receipt import hash_of_tokens
from service.api.schemas.receipt import ReceiptChoice
from service.commands.replay_tokens import ChoiceReplay, Terms, TokenDifference, replay_choice
from service.engine.sequence import SamplingParams
from service.engine.tokenizer import TextTokenizer
from tests.factories import EOS_ID, VOCAB_SIZE, byte_tokenizer

DECODER = TextTokenizer(byte_tokenizer(), VOCAB_SIZE)
PROMPT = tuple(b"hi")


def writing(script: bytes | list[int]) -> Callable[[Sequence[int]], Tensor]:
    """A model that writes the script, then `z` for ever: the token scripted has the logit 2, others 0."""
    text = list(script)
    seen: list[int] = []

    def continue_with(token_ids: Sequence[int]) -> Tensor:
        seen.extend(token_ids)
        assert tuple(seen[: len(PROMPT)]) == PROMPT
        at = len(seen) - len(PROMPT)
        token_logits = torch.zeros(VOCAB_SIZE)
        token_logits[text[at] if at < len(text) else ord("z")] = 2.0
        return token_logits

    return continue_with


def replay(
    script: bytes | list[int], said: bytes | list[int], reason: str, *, known: bool = True, **params: Any
) -> ChoiceReplay:
    """What replaying a receipt of `said` comes to, over a model that writes `script`."""
    choice = ReceiptChoice(
        index=0, tokens=len(said), sha256=hash_of_tokens(list(said)), finish_reason=reason, token_ids=None
    )
    sampling = SamplingParams(**{"temperature": 0.0, "max_new_tokens": 6, **params})
    terms = Terms(PROMPT, sampling, frozenset({EOS_ID}), DECODER, None)
    return replay_choice(writing(script), terms, choice, list(said) if known else None)


@pytest.mark.parametrize(
    ("script", "said", "reason", "params"),
    [
        (b"abcdefgh", b"abcdef", "length", {}),
        ([97, EOS_ID, 98], [97, EOS_ID], "stop", {}),
        ([97, EOS_ID, 98], [97, EOS_ID, 98, *b"zzz"], "length", {"ignore_eos": True}),
        (b"abcdefgh", b"abc", "stop", {"stop_token_ids": frozenset({ord("c")})}),
        (b"abcdefgh", b"abcd", "stop", {"stop": ("cd",)}),
        (b"abcdefgh", b"abcdef", "length", {"stop": ("fgh",)}),
        ([*b"abcde", 0xC3], [*b"abcde", 0xC3], "stop", {"stop": ("e\ufffd",)}),
        (b"", b"", "length", {"max_new_tokens": 0}),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_it_ends_where_the_server_does(
    script: bytes | list[int], said: bytes | list[int], reason: str, params: dict[str, Any], known: bool
) -> None:
    assert replay(script, said, reason, known=known, **params) == ChoiceReplay(0, len(said), reason, True)


def test_the_first_difference_is_placed_and_weighed() -> None:
    replayed = replay(b"abcdef", b"abXdYf", "length")
    assert replayed.difference == TokenDifference(2, ord("X"), ord("c"), pytest.approx(2.0))
    assert (replayed.equal, replayed.tokens, replayed.finish_reason) == (False, 2, None)
    assert replay(b"abcdef", b"abXdYf", "length", known=False) == ChoiceReplay(0, 6, "length", False)


def test_an_output_too_short_or_too_long_differs_at_its_end() -> None:
    assert replay(b"abcdef", b"abc", "length").difference == TokenDifference(3, None, ord("d"), None)
    assert replay(b"abcdef", b"abcdefg", "length").difference == TokenDifference(6, ord("g"), None, None)


def test_another_reason_alone_is_a_difference() -> None:
    assert replay(b"abcdef", b"abcdef", "stop") == ChoiceReplay(0, 6, "length", False)


def test_a_margin_may_be_negative_where_the_draw_decided() -> None:
    """Of 272 tokens the likeliest is drawn rarely: another one of the receipt may be the likelier."""
    params = {"temperature": 1.0, "seed": 1}
    difference = replay(b"aaaaaa", b"aaaaaa", "length", **params).difference
    assert difference is not None
    assert difference.margin == pytest.approx(-2.0)
    assert math.isfinite(difference.margin)
