"""Chooses the next token of every row.

Each request draws from a generator of its own, one uniform number a step, turned into a token by inverting the
cumulative distribution: a seed gives the same text alone and in any batch. Rows that only need temperature, top-k,
top-p and min-p are computed together; a row with a repetition penalty gets it beforehand, alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.events import TokenLogprob
from service.engine.sequence import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler needs of one row. `history` is read only under a repetition penalty."""

    params: SamplingParams
    generator: torch.Generator
    history: Seq[int] = ()


def sample(token_logits: Tensor, rows: Seq[SamplingRow]) -> list[int]:
    """One token id per row, from token_logits [rows, vocabulary] float32."""
    token_logits = _penalised(token_logits, rows)
    chosen = token_logits.argmax(-1)
    random = [i for i, row in enumerate(rows) if not row.params.greedy]
    if random:
        chosen[random] = _draw(token_logits[random], [rows[i] for i in random])
    return chosen.tolist()


def logprobs(token_logits: Tensor, token_id: int, top: int) -> TokenLogprob:
    """The raw log-probability of one row's token and of its `top` likeliest, from token_logits [vocabulary]."""
    normalised = token_logits.log_softmax(-1)
    best = normalised.topk(top) if top else None
    likeliest = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token_id, float(normalised[token_id]), likeliest)


def _penalised(token_logits: Tensor, rows: Seq[SamplingRow]) -> Tensor:
    """Repetition penalty (arXiv 1909.05858): seen tokens' logits are divided by it, or multiplied when negative."""
    asking = [(i, row) for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if not asking:
        return token_logits
    token_logits = token_logits.clone()
    for i, row in asking:
        seen = torch.tensor(sorted(set(row.history)))
        values, penalty = token_logits[i, seen], row.params.repetition_penalty
        token_logits[i, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return token_logits


def _draw(token_logits: Tensor, rows: Seq[SamplingRow]) -> Tensor:
    """Inverse-CDF sampling over the tokens that top-k, top-p and min-p leave.

    In the order of the vocabulary: by likelihood, tokens nearly alike would change places with the batch's rounding.
    """
    column = [[row.params.temperature, row.params.top_p, row.params.min_p] for row in rows]
    temperature, top_p, min_p = torch.tensor(column, dtype=torch.float32).T.unsqueeze(-1)  # [rows, 1] each
    # Shifted first, and never divided by 0, so that a tiny temperature overflows to -inf and not to NaN.
    scaled = (token_logits - token_logits.amax(-1, keepdim=True)) / temperature.clamp_min(1e-30)
    logits, order = scaled.sort(dim=-1, descending=True, stable=True)
    vocabulary = logits.shape[-1]
    top_k = torch.tensor([[row.params.top_k or vocabulary] for row in rows])
    logits = logits.masked_fill(torch.arange(vocabulary) >= top_k, float("-inf"))
    probabilities = logits.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # The likeliest token always stays: before[0] is 0 and top_p > 0.
    kept = (before < top_p) & (probabilities >= min_p * probabilities[:, :1])
    in_order = torch.zeros_like(probabilities).scatter(-1, order, probabilities.where(kept, 0.0))
    cumulative = in_order.double().cumsum(-1)
    uniform = torch.tensor([[_uniform(row.generator)] for row in rows], dtype=torch.float64)
    threshold = uniform * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).clamp_max(vocabulary - 1).squeeze(-1)


def _uniform(generator: torch.Generator) -> float:
    """One number in [0, 1)."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))
