"""A model runner without a model: what the next token is follows from the last one and the row's selection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.low_rank import LowRankBatch
from service.engine.kv.backend import Blocks, joined
from service.engine.sequence import RowLength

VOCABULARY = 50
TOKEN_BYTES = 16  # of a block: a token's id as its key and as its value


class FakeRunner:
    """Answers the last token plus 1, plus the row's weights of the adapters present.

    So the base counts 5, 6, 7 …, and a row that got another row's adapter is off by a visible step. What a real runner
    would hold as keys and values it holds as the tokens themselves: `texts` are its rows, and blocks carry tokens.
    `failing_token` makes a forward raise that is given it; `nan_token` makes its row NaN; `room` bounds the bytes of
    rows, of which a token takes `TOKEN_BYTES`.
    """

    ragged = True

    def __init__(self) -> None:
        self.forwards: list[list[int]] = []  # tokens per row, for each forward that was tried
        self.texts: list[list[int]] = []
        self.failing_token: int | None = None
        self.nan_token: int | None = None
        self.room: int | None = None

    @property
    def rows(self) -> int:
        return len(self.texts)

    def spare(self, lengths: Sequence[RowLength]) -> int:
        room = 1 << 40 if self.room is None else self.room
        return room - len(lengths) * max((length.total for length in lengths), default=0) * TOKEN_BYTES

    @property
    def kv_bytes(self) -> tuple[int, int]:
        return sum(map(len, self.texts)) * TOKEN_BYTES, 1 << 40 if self.room is None else self.room

    def add(self, rows: int) -> None:
        self.texts += [[] for _ in range(rows)]

    def extend(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        batch: LowRankBatch | None,
        *,
        every_position: bool = False,
    ) -> Tensor:
        assert len(set(rows)) == len(rows) == len(tokens)
        assert all(row < len(self.texts) for row in rows), "the scheduler and the runner disagree about the rows"
        self.forwards.append([len(of_row) for of_row in tokens])
        assert self.ragged or len(set(self.forwards[-1])) == 1
        longest = max(map(len, tokens))
        padded = [[0] * (longest - len(of_row)) + list(of_row) for of_row in tokens]
        by_position = [self._token_logits([of_row[i] for of_row in padded], batch) for i in range(longest)]
        token_logits = torch.stack(by_position, 1) if every_position else by_position[-1]
        if any(self.failing_token in of_row for of_row in tokens):
            raise RuntimeError("the forward failed, as it was told to")
        for row, of_row in zip(rows, tokens, strict=True):
            self.texts[row] += of_row
        return token_logits

    def keep(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in rows]

    def read(self, row: int, start: int, end: int) -> Blocks:
        tokens = torch.tensor(self.texts[row][start:end]).reshape(1, -1, 1)
        assert tokens.numel() == end - start
        return [(tokens, tokens)]

    def write(self, row: int, *pieces: Blocks) -> None:
        self.texts[row] += joined(pieces)[0][0].flatten().tolist()

    def _token_logits(self, tokens: Sequence[int], batch: LowRankBatch | None) -> Tensor:
        token_logits = torch.zeros(len(tokens), VOCABULARY)
        for row, token in enumerate(tokens):
            step = 1 + (0 if batch is None else int(batch.weights[row].sum().item()))
            token_logits[row, (token + step) % VOCABULARY] = 10.0
            if token == self.nan_token:
                token_logits[row] = float("nan")
        return token_logits
