"""A model runner without a model: what the next token is follows from the last one and the row's selection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.layers import LowRankBatch

VOCABULARY = 50


class FakeRunner:
    """Answers the last token plus 1, plus the row's weights of the adapters present, each times its place.

    So the base counts 5, 6, 7 …, and a row that got another row's adapter is off by a visible step.
    `failing_token` makes a forward raise that is given it; `nan_token` makes its row NaN.
    """

    def __init__(self) -> None:
        self.forwards: list[tuple[str, int]] = []
        self.failing_token: int | None = None
        self.nan_token: int | None = None
        self._rows = 0

    @property
    def rows(self) -> int:
        return self._rows

    def prefill(self, prompts: Sequence[Sequence[int]], batch: LowRankBatch | None) -> Tensor:
        self.forwards.append(("prefill", len(prompts)))
        token_logits = self._token_logits([prompt[-1] for prompt in prompts], batch)
        self._rows += len(prompts)
        return token_logits

    def decode(self, tokens: Sequence[int], batch: LowRankBatch | None) -> Tensor:
        assert len(tokens) == self._rows, "the scheduler and the runner disagree about the rows"
        self.forwards.append(("decode", len(tokens)))
        return self._token_logits(tokens, batch)

    def keep(self, rows: Sequence[int]) -> None:
        assert all(row < self._rows for row in rows)
        self._rows = len(rows)

    def _token_logits(self, tokens: Sequence[int], batch: LowRankBatch | None) -> Tensor:
        if self.failing_token in tokens:
            raise RuntimeError("the forward failed, as it was told to")
        token_logits = torch.zeros(len(tokens), VOCABULARY)
        for row, token in enumerate(tokens):
            step = 1 + (0 if batch is None else int(batch.weights[row].sum().item()))
            token_logits[row, (token + step) % VOCABULARY] = 10.0
            if token == self.nan_token:
                token_logits[row] = float("nan")
        return token_logits
