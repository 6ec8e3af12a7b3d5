"""Prompts whose log-probabilities are asked for, requests for no tokens, and choices that a grammar guides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from service.engine.events import FailedEvent, FinishedEvent, FinishReason, PromptEvent, TokenEvent
from service.engine.guide import GrammarFailed
from service.engine.prefix_cache import BLOCK
from tests.fake_runner import VOCABULARY
from tests.unit.service.engine.test_worker_prompts import PREFIX, Bench

# The fake model gives the token after the last one a logit of 10 and every other one 0.
SURE = 10 - math.log(math.exp(10) + VOCABULARY - 1)
UNLIKELY = SURE - 10


def near(logprob: float) -> Any:
    return pytest.approx(logprob, abs=1e-5)


def scores(bench: Bench, name: str) -> list[float | None]:
    """The log-probabilities of the request's one PromptEvent, which is its first event."""
    first, *rest = bench.events[name]
    assert isinstance(first, PromptEvent)
    assert not any(isinstance(event, PromptEvent) for event in rest)
    return [None if token is None else token.logprob for token in first.logprobs]


@pytest.mark.parametrize("scored_tokens", [1000, 3, 2])
def test_every_token_of_a_prompt_is_scored_however_it_is_cut(scored_tokens: int) -> None:
    bench = Bench(scored_tokens=scored_tokens)
    bench.admit("prompt", [7, 8, 9, 3, 4], prompt_logprobs=0)
    bench.admit("sql", [7, 9, 11, 12], {"sql": 1.0}, prompt_logprobs=2)
    bench.admit("beside", [20, 21])
    bench.run()
    assert scores(bench, "prompt") == [None, *(near(x) for x in (SURE, SURE, UNLIKELY, SURE))]
    assert scores(bench, "sql") == [None, *(near(x) for x in (SURE, SURE, UNLIKELY))]
    event = bench.events["sql"][0]
    assert isinstance(event, PromptEvent)
    assert event.logprobs[0] is None
    assert [None if token is None else (token.token_id, len(token.top)) for token in event.logprobs[1:]] == [
        (9, 2),
        (11, 2),
        (12, 2),
    ]
    assert bench.tokens("prompt") == [5, 6, 7]
    assert bench.tokens("sql") == [14, 16, 18]
    assert bench.tokens("beside") == [22, 23, 24]


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    bench = Bench()
    bench.admit("one", [7], prompt_logprobs=0)
    bench.run()
    assert scores(bench, "one") == [None]
    assert bench.tokens("one") == [8, 9, 10]


def test_a_scored_prompt_is_run_whole_whatever_the_cache_holds() -> None:
    bench = Bench()
    bench.admit("before", [*PREFIX, 1])
    bench.run()
    bench.admit("scored", [*PREFIX, 1], prompt_logprobs=0)
    bench.run()
    assert len(scores(bench, "scored")) == len(PREFIX) + 1
    assert bench.counted == (2 * len(PREFIX) + 2, 0)
    bench.admit("after", [*PREFIX, 2])
    bench.run()
    assert bench.counted == (2 * len(PREFIX) + 3, 3 * BLOCK), "and is kept for others"


def test_several_choices_wait_for_the_one_that_scores_their_prompt() -> None:
    bench = Bench(scored_tokens=4)
    bench.admit("three", [*range(1, 11)], n=3, prompt_logprobs=0)
    bench.run()
    assert scores(bench, "three") == [None, *[near(SURE)] * 9]
    assert [bench.tokens("three", choice) for choice in range(3)] == [[11, 12, 13]] * 3


def test_a_request_for_no_tokens_ends_with_its_prompt() -> None:
    bench = Bench()
    bench.admit("scored", [7, 8], prompt_logprobs=0, max_new_tokens=0)
    bench.admit("silent", [7, 8], max_new_tokens=0, n=2)
    bench.run()
    assert scores(bench, "scored") == [None, near(SURE)]
    for name, choices in (("scored", 1), ("silent", 2)):
        ends = [event for event in bench.events[name] if isinstance(event, TokenEvent)]
        assert [(end.token_ids, end.text, end.finish_reason) for end in ends] == [
            ((), "", FinishReason.LENGTH)
        ] * choices
        finished = bench.events[name][-1]
        assert isinstance(finished, FinishedEvent)
        assert finished.usage.completion_tokens == 0


def test_a_prompt_that_cannot_be_scored_fails_alone() -> None:
    bench = Bench()
    bench.runner.nan_token = 8
    bench.admit("broken", [7, 8, 9], prompt_logprobs=0)
    bench.admit("fine", [1, 2], prompt_logprobs=0)
    bench.run()
    (failed,) = bench.events["broken"]
    assert isinstance(failed, FailedEvent)
    assert failed.code == "internal_error"
    assert scores(bench, "fine") == [None, near(SURE)]


def test_what_goes_wrong_in_scoring_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    with monkeypatch.context() as patch:
        patch.setattr("service.engine.sampler.logprobs", lambda *arguments: 1 / 0)
        bench.admit("scored", [7, 8, 9], prompt_logprobs=0)
        bench.admit("fine", [1])
        bench.run()
    (failed,) = bench.events["scored"]
    assert isinstance(failed, FailedEvent)
    assert bench.tokens("fine") == [2, 3, 4]


def test_cancelled_while_it_is_scored() -> None:
    bench = Bench(scored_tokens=2)
    job = bench.admit("long", [*range(1, 20)], prompt_logprobs=0)
    bench.worker.step()
    job.cancel()
    bench.run()
    assert not any(isinstance(event, PromptEvent) for event in bench.events["long"])
    assert isinstance(bench.events["long"][-1], FinishedEvent)


# --- grammars -------------------------------------------------------------------------------------


@dataclass
class Words:
    """A grammar of one sentence: exactly these tokens. `broken` allows nothing at all."""

    tokens: Sequence[int]
    broken: bool = False

    def start(self) -> WordsGuide:
        return WordsGuide(self)


@dataclass
class WordsGuide:
    grammar: Words
    taken: list[int] = field(default_factory=list)

    def allowed(self) -> torch.Tensor:
        if self.grammar.broken:
            raise GrammarFailed("no token may follow")
        mask = torch.zeros(VOCABULARY, dtype=torch.bool)
        mask[self.grammar.tokens[len(self.taken)]] = True
        return mask

    def accept(self, token_id: int) -> None:
        assert token_id == self.grammar.tokens[len(self.taken)]
        self.taken.append(token_id)

    @property
    def complete(self) -> bool:
        return len(self.taken) == len(self.grammar.tokens)


def test_a_grammar_guides_its_own_choices_alone() -> None:
    bench = Bench()
    bench.admit("guided", [1], grammar=Words([30, 3, 12, 12]), max_new_tokens=20, n=2)
    bench.admit("drawn", [1], grammar=Words([5, 5]), max_new_tokens=20, temperature=1.0, seed=1)
    bench.admit("free", [1])
    bench.run()
    assert bench.tokens("guided", 0) == bench.tokens("guided", 1) == [30, 3, 12, 12]
    assert bench.tokens("drawn") == [5, 5]
    assert bench.tokens("free") == [2, 3, 4]
    reasons = [e.finish_reason for e in bench.events["guided"] if isinstance(e, TokenEvent) and e.finish_reason]
    assert reasons == [FinishReason.STOP] * 2


def test_a_grammar_does_not_lengthen_an_answer() -> None:
    bench = Bench()
    bench.admit("cut", [1], grammar=Words([30, 3, 12]), max_new_tokens=2)
    bench.run()
    assert bench.tokens("cut") == [30, 3]
    (reason,) = [e.finish_reason for e in bench.events["cut"] if isinstance(e, TokenEvent) and e.finish_reason]
    assert reason is FinishReason.LENGTH


def test_a_grammar_that_fails_ends_its_own_request() -> None:
    bench = Bench()
    bench.admit("broken", [1], grammar=Words([1], broken=True))
    bench.admit("free", [1])
    bench.run()
    (failed,) = bench.events["broken"]
    assert isinstance(failed, FailedEvent)
    assert failed.code == "invalid_request", "its author is to blame, not the engine"
    assert "no token may follow" in failed.message
    assert bench.tokens("free") == [2, 3, 4]
