"""Runs the model: the narrow seam that engine tests fake, and its implementation over a Hugging Face causal LM."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from adapters.layers import AdaptedModel
from adapters.low_rank import LowRankBatch
from service.engine.graphs.decode import DecodeGraphs
from service.engine.kv.backend import Blocks, KVBackend, joined
from service.engine.sequence import RowLength


class ModelRunner(Protocol):
    """A batch of rows, numbered from 0, each with its own low-rank part.

    Token logits come back as float32 on the CPU: [rows, vocabulary], for the last token of each row that was extended.
    """

    @property
    def rows(self) -> int: ...

    @property
    def ragged(self) -> bool:
        """Whether the rows of one `extend` may take different numbers of tokens."""
        ...

    def spare(self, lengths: Sequence[RowLength]) -> int:
        """Bytes of the memory for keys and values left beside rows grown to these lengths; negative: they do not fit.

        May be asked from any thread.
        """
        ...

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """What the rows' tokens take, and all the memory for keys and values. May be asked from any thread."""
        ...

    def add(self, rows: int) -> None:
        """Adds empty rows after those there."""
        ...

    def extend(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        batch: LowRankBatch | None,
        *,
        every_position: bool = False,
    ) -> Tensor:
        """Runs more tokens of some rows. When it raises, nothing has happened and it may be tried again.

        With `every_position` the token logits are [rows, positions, vocabulary], a row's own positions its last ones.
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order, and drops the others."""
        ...

    def read(self, row: int, start: int, end: int) -> Blocks:
        """A copy of the keys and values of a row's tokens from `start` to `end`."""
        ...

    def write(self, row: int, *pieces: Blocks) -> None:
        """Appends keys and values as they were read earlier to a row, instead of running their tokens."""
        ...


class TransformersRunner:
    """Any Hugging Face causal LM over a key-value backend. With `graphs`, decode steps that fit them are replayed."""

    def __init__(self, adapted: AdaptedModel, device: torch.device, kv: KVBackend) -> None:
        self._adapted = adapted
        self._device = device
        self.kv = kv
        self.graphs: DecodeGraphs | None = None
        accepted = inspect.signature(adapted.model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.keeps_last_logits = "logits_to_keep" in accepted

    @property
    def rows(self) -> int:
        return self.kv.rows

    @property
    def ragged(self) -> bool:
        return self.kv.ragged

    def spare(self, lengths: Sequence[RowLength]) -> int:
        return self.kv.spare([length.total for length in lengths])

    @property
    def kv_bytes(self) -> tuple[int, int]:
        return self.kv.used_bytes, self.kv.budget_bytes

    def add(self, rows: int) -> None:
        self.kv.add(rows)

    @torch.inference_mode()
    def extend(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        batch: LowRankBatch | None,
        *,
        every_position: bool = False,
    ) -> Tensor:
        if self.graphs is not None and not every_position:
            replayed = self.graphs.run(rows, tokens, batch)
            if replayed is not None:
                return replayed
        step = self.kv.begin(rows, [len(of_row) for of_row in tokens])
        arguments: dict[str, Any] = {}
        if self.keeps_last_logits and not every_position:
            arguments["logits_to_keep"] = 1
        if self.takes_positions:
            arguments["position_ids"] = step.positions
        with self._adapted.using(batch):
            output = self._adapted.model(
                input_ids=_padded(tokens).to(self._device),
                attention_mask=step.mask,
                past_key_values=step.cache,
                use_cache=True,
                **arguments,
            )
        token_logits: Tensor = (output.logits if every_position else output.logits[:, -1]).float().cpu()
        self.kv.commit()
        return token_logits

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        self.kv.keep(rows)

    @torch.inference_mode()
    def read(self, row: int, start: int, end: int) -> Blocks:
        return self.kv.read(row, start, end)

    @torch.inference_mode()
    def write(self, row: int, *pieces: Blocks) -> None:
        self.kv.write(row, joined(pieces))


def _padded(tokens: Sequence[Sequence[int]]) -> Tensor:
    """Token ids [rows, queries], padded with 0 on the left."""
    longest = max(len(of_row) for of_row in tokens)
    return torch.tensor([[0] * (longest - len(of_row)) + list(of_row) for of_row in tokens])
