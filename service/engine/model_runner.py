"""Runs the model: the narrow seam that engine tests fake, and its implementation over a Hugging Face causal LM."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from adapters.layers import AdaptedModel, LowRankBatch
from service.engine.kv_cache import RowsCache

log = logging.getLogger(__name__)

# Rows of one batch may differ by this much from the same rows alone, relative to the largest token logit.
_SELF_TEST_TOLERANCE = 1e-3


class ModelRunner(Protocol):
    """A batch of rows, in the order they joined, each with its own low-rank part.

    Token logits come back as [rows, vocabulary] float32 on the CPU, for the last token of each row.
    """

    @property
    def rows(self) -> int: ...

    def prefill(self, prompts: Sequence[Sequence[int]], batch: LowRankBatch | None) -> Tensor:
        """Runs whole prompts; their rows join the batch, after those already there."""
        ...

    def decode(self, tokens: Sequence[int], batch: LowRankBatch | None) -> Tensor:
        """Runs one more token of every row."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drops every row but these."""
        ...


class TransformersRunner:
    """Any Hugging Face causal LM, with the rows backend of `kv_cache`."""

    def __init__(self, adapted: AdaptedModel, device: torch.device) -> None:
        self._adapted = adapted
        self._device = device
        self._kv: RowsCache | None = None
        accepted = inspect.signature(adapted.model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._last_logits_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @property
    def rows(self) -> int:
        return 0 if self._kv is None else len(self._kv.mask)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], batch: LowRankBatch | None) -> Tensor:
        length = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        joining = RowsCache.empty(mask.to(self._device))
        positions = (joining.mask.cumsum(1) - 1).clamp_min(0)
        token_logits = self._forward(joining, ids.to(self._device), positions, batch)
        if self._kv is None:
            self._kv = joining
        else:
            self._kv.join(joining)
        return token_logits

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], batch: LowRankBatch | None) -> Tensor:
        assert self._kv is not None
        assert len(tokens) == self.rows
        positions = self._kv.extend()
        ids = torch.tensor(tokens, device=self._device).unsqueeze(1)  # [rows, 1]
        return self._forward(self._kv, ids, positions, batch)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        if self._kv is not None and len(rows) < self.rows:
            self._kv.keep(rows) if rows else self._clear()

    def _clear(self) -> None:
        self._kv = None

    def _forward(self, kv: RowsCache, ids: Tensor, positions: Tensor, batch: LowRankBatch | None) -> Tensor:
        arguments: dict[str, Any] = {**self._last_logits_only}
        if self._takes_positions:
            arguments["position_ids"] = positions
        with self._adapted.using(batch):
            output = self._adapted.model(
                input_ids=ids, attention_mask=kv.mask, past_key_values=kv.cache, use_cache=True, **arguments
            )
        return output.logits[:, -1].float().cpu()  # type: ignore[no-any-return]


def batching_is_exact(runner: TransformersRunner, vocabulary: int) -> bool:
    """Whether rows of different lengths, batched, get the token logits that each gets alone.

    Some architectures cannot take left padding; they answer plausibly and wrongly, so this is tested at load.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (3, 11)]
    alone = []
    for prompt in prompts:
        first = runner.prefill([prompt], None)
        alone.append(torch.cat([first, runner.decode([prompt[0]], None)]))
        runner.keep([])
    together = torch.stack([runner.prefill(prompts, None), runner.decode([prompt[0] for prompt in prompts], None)], 1)
    runner.keep([])
    expected = torch.stack(alone)  # [rows, 2 steps, vocabulary]
    scale = float(expected.abs().max()) or 1.0
    widest = float((together - expected).abs().max()) / scale
    # 16-bit models round differently with the shape of the batch.
    dtype = next(runner._adapted.model.parameters()).dtype
    return widest <= max(_SELF_TEST_TOLERANCE, 16 * torch.finfo(dtype).eps)
