"""Runs a model over whole texts: the narrow seam that tests fake, and its implementation over transformers models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.layers import AdaptedModel
from adapters.low_rank import LowRankBatch
from service.engine.task import Pooling

Readout = Callable[[Any, Tensor], Tensor]  # (the model's output, mask [rows, tokens]) → [rows, width]


@dataclass(frozen=True, slots=True)
class PooledText:
    """One row: its token ids, and their types if the tokenizer told texts of a pair apart."""

    tokens: Sequence[int]
    types: Sequence[int] | None = None


class PoolingRunner(Protocol):
    """Texts in, one vector each out: no row stays behind."""

    @property
    def ragged(self) -> bool:
        """Whether the texts of one `run` may differ in length."""
        ...

    def run(self, texts: Sequence[PooledText], batch: LowRankBatch | None) -> Tensor:
        """[rows, width], float32 on the CPU. When it raises, nothing has happened and it may be tried again."""
        ...


class TransformersPoolingRunner:
    """Any Hugging Face model that reads a text in one forward. Texts are padded on the right, with `pad`.

    Without a padding token, texts of one length alone run together: a decoder's own code takes the text's last token
    for the last one that is not padding.
    """

    def __init__(
        self, adapted: AdaptedModel, device: torch.device, readout: Readout, *, pad: int | None, ragged: bool = True
    ) -> None:
        self._adapted = adapted
        self._device = device
        self._readout = readout
        self._pad = pad
        self.ragged = ragged and pad is not None
        accepted = inspect.signature(adapted.model.forward).parameters
        self._takes_types = "token_type_ids" in accepted
        self._keeps_cache = "use_cache" in accepted

    @torch.inference_mode()
    def run(self, texts: Sequence[PooledText], batch: LowRankBatch | None) -> Tensor:
        longest = max(len(text.tokens) for text in texts)
        assert self.ragged or all(len(text.tokens) == longest for text in texts)
        mask = self._rows([[1] * len(text.tokens) for text in texts], longest, 0)
        arguments: dict[str, Any] = {}
        if self._takes_types and any(text.types for text in texts):
            types = [text.types or [0] * len(text.tokens) for text in texts]
            arguments["token_type_ids"] = self._rows(types, longest, 0)
        if self._keeps_cache:
            arguments["use_cache"] = False
        with self._adapted.using(batch):
            tokens = self._rows([text.tokens for text in texts], longest, self._pad or 0)
            output = self._adapted.model(input_ids=tokens, attention_mask=mask, **arguments)
            pooled: Tensor = self._readout(output, mask).float().cpu()
        return pooled

    def _rows(self, rows: Sequence[Sequence[int]], longest: int, fill: int) -> Tensor:
        padded = [[*row, *[fill] * (longest - len(row))] for row in rows]
        return torch.tensor(padded, device=self._device)


def label_logits(output: Any, mask: Tensor) -> Tensor:
    """What a classifier answers: as wide as the widest head of the batch, each row's own labels first."""
    logits: Tensor = output.logits
    return logits


def embeddings(pooling: Pooling, *, normalize: bool) -> Readout:
    """Reads embeddings from a text's last hidden states [rows, tokens, hidden], padded on the right."""

    def read(output: Any, mask: Tensor) -> Tensor:
        vectors = _READERS[pooling](output.last_hidden_state.float(), mask)
        return F.normalize(vectors, dim=-1) if normalize else vectors

    return read


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    counted = mask.unsqueeze(-1).to(states.dtype)
    # Not a plain product: what stands at padding is nobody's, and may be no number.
    return states.masked_fill(counted == 0, 0.0).sum(1) / counted.sum(1)


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, 0]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]


_READERS: dict[Pooling, Callable[[Tensor, Tensor], Tensor]] = {
    Pooling.MEAN: _mean,
    Pooling.CLS: _first,
    Pooling.LAST: _last,
}
