"""Chooses the next token of every row.

Each request draws from a generator of its own, one uniform number a step, turned into a token by inverting the
cumulative distribution: a seed gives the same text alone and in any batch. Rows that only need temperature, top-k,
top-p and min-p are computed together; a row with penalties, a bias or a grammar gets them beforehand, alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.events import TokenLogprob
from service.engine.sequence import SamplingParams

_MOST = 1e30  # of a temperature or a penalty, and its inverse the least: far beyond any use, and far from overflow
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler needs of one row. `prompt` and `output` are token ids; `allowed` a bool mask [vocabulary]."""

    params: SamplingParams
    generator: torch.Generator
    prompt: Seq[int] = ()
    output: Seq[int] = ()
    allowed: Tensor | None = None

    @property
    def reshapes(self) -> bool:
        return self.params.reshapes or self.allowed is not None


def choice_generator(seed: int, choice: int) -> torch.Generator:
    """What choice i draws from: seed + i, so that `n` choices with one seed differ and each can be repeated."""
    return torch.Generator().manual_seed((seed + choice) % 2**63)


def sample(token_logits: Tensor, rows: Seq[SamplingRow]) -> list[int]:
    """One token id per row, from finite token_logits [rows, vocabulary] float32."""
    asking = [i for i, row in enumerate(rows) if row.reshapes]
    if asking:
        token_logits = token_logits.clone()
        for i in asking:
            token_logits[i] = _reshaped(token_logits[i], rows[i])
    chosen = token_logits.argmax(-1)
    random = [i for i, row in enumerate(rows) if not row.params.greedy]
    if random:
        chosen[random] = _draw(token_logits[random], [rows[i] for i in random])
    return chosen.tolist()


def logprobs(token_logits: Tensor, token_ids: Seq[int], top: int) -> list[TokenLogprob]:
    """The raw log-probability of one token per position and of the `top` likeliest there.

    From token_logits [positions, vocabulary].
    """
    if not token_ids:
        return []
    normalised = token_logits.log_softmax(-1)
    chosen = normalised.gather(-1, torch.tensor(token_ids).unsqueeze(-1)).squeeze(-1).tolist()
    best = normalised.topk(min(top, normalised.shape[-1]))
    likeliest = [
        tuple(zip(*each, strict=True)) for each in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [TokenLogprob(*each) for each in zip(token_ids, chosen, likeliest, strict=True)]


def _reshaped(token_logits: Tensor, row: SamplingRow) -> Tensor:
    """One row's token logits [vocabulary] after its penalties, its bias and its grammar, in this order."""
    params = row.params
    if params.repetition_penalty != 1.0:
        token_logits = _less_repetitive(token_logits, [*row.prompt, *row.output], params.repetition_penalty)
    if row.output and (params.presence_penalty or params.frequency_penalty):
        seen, counts = torch.unique(torch.tensor(row.output), return_counts=True)
        token_logits[seen] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biased, biases = zip(*params.logit_bias, strict=True)
        token_logits[torch.tensor(biased)] += torch.tensor(biases)
    if row.allowed is None:
        return token_logits
    # What is allowed stays above what is not, even where the model itself says -inf.
    return token_logits.clamp_min(_LOWEST).masked_fill(~row.allowed, -math.inf)


def _less_repetitive(token_logits: Tensor, history: Seq[int], penalty: float) -> Tensor:
    """Repetition penalty (arXiv 1909.05858): seen tokens' logits are divided by it, or multiplied when negative."""
    penalty = min(max(penalty, 1 / _MOST), _MOST)
    seen = torch.tensor(history)  # one that is there twice is written the same twice
    values = token_logits[seen]
    penalised = torch.where(values > 0, values / penalty, values * penalty).clamp_max(-_LOWEST)
    return token_logits.index_put((seen,), penalised)


def _draw(token_logits: Tensor, rows: Seq[SamplingRow]) -> Tensor:
    """Inverse-CDF sampling over the tokens that top-k, top-p and min-p leave.

    In the order of the vocabulary: by likelihood, tokens nearly alike would change places with the batch's rounding.
    """
    temperature, min_p = torch.tensor([[row.params.temperature, row.params.min_p] for row in rows]).T.unsqueeze(-1)
    # Shifted first, and never divided by 0 or infinity, so that no temperature makes a NaN.
    scaled = (token_logits - token_logits.amax(-1, keepdim=True)) / temperature.clamp(1 / _MOST, _MOST)  # at most 0
    for i, row in enumerate(rows):
        if row.params.top_k or row.params.top_p < 1.0:
            scaled[i] = _cut(scaled[i], row.params.top_k, row.params.top_p)
    weights = scaled.exp()  # probabilities, but for a factor that makes the likeliest one 1
    cumulative = weights.where(weights >= min_p, 0.0).double().cumsum(-1)
    uniform = torch.tensor([[_uniform(row.generator)] for row in rows], dtype=torch.float64)
    threshold = uniform * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).clamp_max(scaled.shape[-1] - 1).squeeze(-1)


def _cut(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """One row's logits [vocabulary] with -inf for all but the tokens that top-k and then top-p leave, at least one.

    Of tokens as likely as each other the first in the vocabulary stay. Only what may stay is sorted: sorting a large
    vocabulary takes longer than all the rest.
    """
    left = torch.arange(len(scaled))
    if 0 < top_k < len(scaled):
        left = _likeliest_first(scaled, scaled >= scaled.topk(top_k).values[-1])[:top_k]
    if top_p < 1.0:
        probabilities = scaled[left].softmax(-1)
        # All that are less likely than this have less than 1 - top_p together. (Half of it, for rounding.)
        candidates = _likeliest_first(probabilities, probabilities >= (1.0 - top_p) / (2 * len(left)))
        likely = probabilities[candidates]
        before = likely.cumsum(-1) - likely
        left = left[candidates[: max(1, int((before < top_p).sum()))]]
    return torch.full_like(scaled, -math.inf).index_copy(0, left, scaled[left])


def _likeliest_first(values: Tensor, chosen: Tensor) -> Tensor:
    """The places where the mask `chosen` is set, by falling value; of equal ones the first comes first."""
    places = chosen.nonzero().squeeze(-1)
    return places[values[places].argsort(descending=True, stable=True)]


def _uniform(generator: torch.Generator) -> float:
    """One number in [0, 1)."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))
