"""A choice's tokens recomputed one by one, up to the first that is not what a receipt says.

The logits are anyone's; how a token is chosen from them is the server's own sampler: one uniform number a step, from
the seed's generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from service.api.receipt import hash_of_tokens
from service.api.schemas.receipt import ReceiptChoice
from service.engine.detokenizer import Decoder, TextStream
from service.engine.events import FinishReason
from service.engine.guide import Grammar
from service.engine.sampler import SamplingRow, choice_generator, logprobs, sample
from service.engine.sequence import SamplingParams

# Takes more tokens of one text, the prompt first, and returns the token logits [vocabulary] that follow, float32.
Continue = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True)
class Terms:
    """What the choices of a receipt have in common. `eos_token_ids` are those that end a choice."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: frozenset[int]
    decoder: Decoder
    grammar: Grammar | None


@dataclass(frozen=True, slots=True)
class TokenDifference:
    """The first token that differs; None where that side's output has ended.

    `margin` is by how much the replay holds its own token likelier than the receipt's, in log-probability of the raw
    distribution: near 0, rounding may have decided.
    """

    position: int
    receipt: int | None
    replay: int | None
    margin: float | None


@dataclass(frozen=True, slots=True)
class ChoiceReplay:
    """What became of one choice. `finish_reason` None: the replay stopped at the difference.

    A receipt whose token ids are not known can differ (`equal` is false) without saying where.
    """

    index: int
    tokens: int
    finish_reason: str | None
    equal: bool
    difference: TokenDifference | None = None


def replay_choice(
    continue_with: Continue,
    terms: Terms,
    choice: ReceiptChoice,
    expected: Sequence[int] | None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> ChoiceReplay:
    """Recomputes one choice. `expected` are its token ids, if they are known; `advance` is told of every token.

    Raises GrammarFailed.
    """
    output: list[int] = []
    chooser = _Chooser(terms, choice.index, output)
    reason = FinishReason.LENGTH if terms.params.max_new_tokens == 0 else None
    tokens: Sequence[int] = terms.prompt_ids
    while reason is None:
        token_logits = continue_with(tokens)
        token = chooser.choose(token_logits)
        if expected is not None and list(expected[len(output) : len(output) + 1]) != [token]:
            return _differs(choice.index, output, expected, token, token_logits)
        reason = chooser.take(token)
        advance(1)
        tokens = [token]
    if expected is not None and len(output) < len(expected):
        difference = TokenDifference(len(output), expected[len(output)], None, None)
        return ChoiceReplay(choice.index, len(output), reason, False, difference)
    equal = (hash_of_tokens(output), reason) == (choice.sha256, choice.finish_reason)
    return ChoiceReplay(choice.index, len(output), reason, equal)


def _differs(
    index: int, output: Sequence[int], expected: Sequence[int], token: int, token_logits: Tensor
) -> ChoiceReplay:
    at = len(output)
    if at == len(expected):
        return ChoiceReplay(index, at, None, False, TokenDifference(at, None, token, None))
    both = logprobs(token_logits.expand(2, -1), [token, expected[at]], 0)
    margin = both[0].logprob - both[1].logprob
    return ChoiceReplay(index, at, None, False, TokenDifference(at, expected[at], token, margin))


class _Chooser:
    """Chooses the tokens of one choice and says when it ends, as the server does. Appends them to `output`."""

    def __init__(self, terms: Terms, index: int, output: list[int]) -> None:
        params = terms.params
        self._terms = terms
        self._output = output
        self._generator = choice_generator(params.seed or 0, index)  # greedy ones draw nothing
        self._text = TextStream(terms.decoder, params.stop, terms.prompt_ids)
        self._guide = None if terms.grammar is None else terms.grammar.start()
        self._ends = params.stop_token_ids | (frozenset() if params.ignore_eos else terms.eos_token_ids)

    def choose(self, token_logits: Tensor) -> int:
        allowed = None if self._guide is None else self._guide.allowed()
        row = SamplingRow(self._terms.params, self._generator, self._terms.prompt_ids, self._output, allowed)
        (token,) = sample(token_logits.unsqueeze(0), [row])
        return token

    def take(self, token: int) -> FinishReason | None:
        """Why the choice ends with this token, if it does."""
        self._output.append(token)
        if self._guide is not None:
            self._guide.accept(token)
        if token in self._ends:
            return FinishReason.STOP
        self._text.push(token)
        if self._text.stopped or (self._guide is not None and self._guide.complete):
            return FinishReason.STOP
        if len(self._output) < self._terms.params.max_new_tokens:
            return None
        self._text.finish()  # a stop string may be complete only in what was held back
        return FinishReason.STOP if self._text.stopped else FinishReason.LENGTH
