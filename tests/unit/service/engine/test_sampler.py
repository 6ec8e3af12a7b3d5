from __future__ import annotations

import math

import pytest
import torch

from service.engine.sampler import SamplingRow, logprobs, sample
from service.engine.sequence import SamplingParams


def row(
    seed: int = 0,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    allowed: torch.Tensor | None = None,
    **params: object,
) -> SamplingRow:
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return SamplingRow(sampling, torch.Generator().manual_seed(seed), prompt, output, allowed)


def frequencies(token_logits: torch.Tensor, draws: int = 4000, **params: object) -> torch.Tensor:
    """How often each token is drawn, one generator advancing from draw to draw."""
    one = row(**params)
    drawn = [sample(token_logits, [one])[0] for _ in range(draws)]
    return torch.bincount(torch.tensor(drawn), minlength=token_logits.shape[-1]) / draws


def test_greedy_takes_the_likeliest() -> None:
    token_logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(token_logits, [row(temperature=0.0), row(temperature=0.0)]) == [1, 0]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([[0.1, 0.6, 0.3]])
    assert torch.allclose(frequencies(probabilities.log()), probabilities[0], atol=0.03)


def test_temperature_sharpens() -> None:
    token_logits = torch.tensor([[0.1, 0.6, 0.3]]).log()
    expected = (token_logits[0] / 0.5).softmax(-1)
    assert torch.allclose(frequencies(token_logits, temperature=0.5), expected, atol=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 1}, {1}),
        ({"top_p": 0.6}, {1}),
        ({"top_p": 0.61}, {1, 2}),
        ({"top_p": 1e-6}, {1}),
        ({"min_p": 0.4}, {1, 2}),
        ({"min_p": 0.6}, {1}),
        ({"top_k": 2, "top_p": 0.5}, {1}),
        ({}, {0, 1, 2}),
    ],
)
def test_what_top_k_top_p_and_min_p_keep(params: dict[str, float], kept: set[int]) -> None:
    token_logits = torch.tensor([[0.1, 0.6, 0.3]]).log()
    assert set(frequencies(token_logits, draws=600, **params).nonzero().flatten().tolist()) == kept


def test_a_seed_draws_the_same_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(7)
    steps = torch.randn(20, 40, generator=generator)
    alone = [sample(step[None], [one])[0] for one in [row(seed=3)] for step in steps]
    mine, other, greedy = row(seed=3), row(seed=4, top_p=0.5), row(temperature=0.0)
    together = [sample(torch.stack([step.flip(0), step, step]), [other, mine, greedy])[1] for step in steps]
    assert together == alone


def test_a_tiny_temperature_is_greedy_and_not_nan() -> None:
    token_logits = torch.tensor([[1.0, 1.001, -50.0]])
    assert sample(token_logits, [row(temperature=1e-30)]) == [1]


def test_impossible_tokens_are_never_drawn() -> None:
    token_logits = torch.full((1, 5), float("-inf"))
    token_logits[0, 3] = 0.0
    assert frequencies(token_logits, draws=50)[3] == 1.0


def test_repetition_penalty_lowers_seen_tokens_whatever_their_sign() -> None:
    token_logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    assert sample(token_logits, [row(temperature=0.0, repetition_penalty=1.2, prompt=(0,))]) == [1]
    assert sample(token_logits, [row(temperature=0.0, repetition_penalty=1.2, output=(0,))]) == [1]
    seen_negative = torch.tensor([[-1.0, -1.1]])
    assert sample(seen_negative, [row(temperature=0.0, repetition_penalty=1.2, prompt=(0,))]) == [1]
    assert token_logits[0, 0] == 2.0, "the caller's token logits stay as they are"


def test_logprobs_are_of_the_raw_distribution() -> None:
    token_logits = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]).log()
    first, second = logprobs(token_logits, [0, 2], 0)
    assert (first.token_id, second.token_id) == (0, 2)
    assert math.isclose(first.logprob, math.log(0.1), rel_tol=1e-5)
    assert math.isclose(second.logprob, math.log(0.3), rel_tol=1e-5)
    assert first.top == second.top == ()
    first, second = logprobs(token_logits, [0, 2], 2)
    assert [token for token, _ in first.top] == [1, 2]
    assert [token for token, _ in second.top] == [0, 2]
    assert math.isclose(first.top[0][1], math.log(0.6), rel_tol=1e-5)
    assert logprobs(token_logits[:0], [], 2) == []
    assert len(logprobs(token_logits, [0, 2], 20)[0].top) == 3, "no more than there are"


def test_rounding_between_tokens_nearly_alike_changes_no_draw() -> None:
    """A row's company moves its token logits in the last digits, and so may swap such tokens' order of likelihood."""
    generator = torch.Generator().manual_seed(0)
    token_logits = 1e-5 * torch.randn(1, 2000, generator=generator)
    nudged = token_logits + 1e-7 * torch.randn(1, 2000, generator=generator)
    assert not torch.equal(token_logits.argsort(), nudged.argsort())
    one, other = row(seed=1), row(seed=1)
    assert [sample(token_logits, [one]) for _ in range(50)] == [sample(nudged, [other]) for _ in range(50)]


def test_presence_and_frequency_penalties_count_generated_tokens_alone() -> None:
    token_logits = torch.tensor([[2.0, 1.8, 1.6]])
    assert sample(token_logits, [row(temperature=0.0, presence_penalty=0.3, prompt=(0, 0))]) == [0]
    assert sample(token_logits, [row(temperature=0.0, presence_penalty=0.3, output=(0,))]) == [1]
    assert sample(token_logits, [row(temperature=0.0, presence_penalty=0.3, output=(0, 1))]) == [0]
    assert sample(token_logits, [row(temperature=0.0, frequency_penalty=0.3, output=(0, 0, 1))]) == [2]
    assert sample(token_logits, [row(temperature=0.0, presence_penalty=-1.0, output=(2,))]) == [2], "negative: rewards"


def test_logit_bias_moves_the_tokens_that_it_names() -> None:
    token_logits = torch.tensor([[2.0, 1.0, 0.0]])
    assert sample(token_logits, [row(temperature=0.0, logit_bias=((2, 2.5),))]) == [2]
    assert frequencies(token_logits, draws=50, logit_bias=((0, -100.0), (1, -100.0)))[2] == 1.0
    assert token_logits[0].tolist() == [2.0, 1.0, 0.0]


def test_only_allowed_tokens_are_chosen_and_no_bias_changes_that() -> None:
    token_logits = torch.tensor([[9.0, 1.0, 0.0], [9.0, 1.0, 0.0]])
    allowed = torch.tensor([False, False, True])
    bias = {"temperature": 0.0, "logit_bias": ((1, 100.0),)}
    assert sample(token_logits, [row(allowed=allowed, **bias), row(temperature=0.0)]) == [2, 0]
    drawn = {sample(token_logits[:1], [row(seed=seed, allowed=~allowed, temperature=8.0)])[0] for seed in range(200)}
    assert drawn == {0, 1}


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_k": 2**70},
        {"top_p": 5e-324},
        {"top_p": 1e-50, "top_k": 2},
        {"min_p": 1.0},
        {"temperature": 1e300},
        {"temperature": 5e-324},
        {"temperature": 1e300, "top_p": 1e-50, "top_k": 3},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e300, "temperature": 0.0},
    ],
)
@pytest.mark.parametrize("model_allows", [True, False])
def test_no_parameter_makes_a_row_choose_what_its_grammar_forbids(
    extreme: dict[str, float], *, model_allows: bool
) -> None:
    token_logits = torch.tensor([[-3.0, 2.0, 0.0, -1.0, 5.0, 1.0]])
    allowed = torch.tensor([False, True, True, True, False, False])
    if not model_allows:
        token_logits[:, allowed] = -math.inf
    drawn = {sample(token_logits, [row(seed, (0, 1, 2, 3, 4, 5), (1, 1), allowed, **extreme)])[0] for seed in range(50)}
    assert drawn <= {1, 2, 3}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.7), (30, 0.9), (3, 0.2), (0, 0.999), (40, 1.0)])
def test_top_k_and_top_p_keep_what_a_sort_of_the_whole_vocabulary_would(seed: int, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    token_logits = torch.randint(-6, 6, (40,), generator=generator).float()  # many are equal
    by_likelihood = sorted(range(40), key=lambda i: (-token_logits[i].item(), i))[: top_k or 40]
    weights = [math.exp(token_logits[i].item()) for i in by_likelihood]
    before = [sum(weights[:i]) / sum(weights) for i in range(len(weights))]
    expected = {token for token, mass in zip(by_likelihood, before, strict=True) if mass < top_p}
    likeliest = sample(token_logits.expand(200, -1), [row(draw, top_k=top_k, top_p=top_p) for draw in range(200)])
    assert set(likeliest) <= expected
    flat = sample(token_logits.expand(2000, -1), [row(draw, top_k=top_k, temperature=1e9) for draw in range(2000)])
    assert set(flat) == set(by_likelihood)
