"""Chooses the next token of every row.

Each request draws from a generator of its own, one uniform number a step, turned into a token by inverting the
cumulative distribution: a seed gives the same text alone and in any batch. Rows that only need temperature, top-k,
top-p and min-p are computed together; a row with penalties, a bias or a grammar gets them beforehand, alone.
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
    """What the sampler needs of one row. `prompt` and `output` are token ids; `allowed` a bool mask [vocabulary]."""

    params: SamplingParams
    generator: torch.Generator
    prompt: Seq[int] = ()
    output: Seq[int] = ()
    allowed: Tensor | None = None

    @property
    def reshapes(self) -> bool:
        return self.params.reshapes or self.allowed is not None


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
    for token_id, bias in params.logit_bias:
        token_logits[token_id] += bias
    return token_logits if row.allowed is None else token_logits.masked_fill(~row.allowed, float("-inf"))


def _less_repetitive(token_logits: Tensor, history: Seq[int], penalty: float) -> Tensor:
    """Repetition penalty (arXiv 1909.05858): seen tokens' logits are divided by it, or multiplied when negative."""
    seen = torch.tensor(sorted(set(history)))
    values = token_logits[seen]
    return token_logits.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))


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
