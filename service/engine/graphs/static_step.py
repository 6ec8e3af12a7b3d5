"""One decode step of static shape: what is captured. It reads and writes buffers that never move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapters.kernels.table_batch import TableBatch
from adapters.layers import AdaptedModel
from service.engine.graphs.buckets import Bucket
from service.engine.kv.slots import SlotBackend


class StepBuffers:
    """What a step is told and what it answers, for up to `rows` rows, on the device.

    `told` [3, rows] int64: each row's token, its position, and the column that its keys and values go to.
    `token_logits` [rows, vocabulary] float32. `row_index` [rows, 1].
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self.told = torch.zeros(3, rows, dtype=torch.long, device=device)
        self.token_logits = torch.zeros(rows, vocabulary, device=device)
        self.row_index = torch.arange(rows, device=device).unsqueeze(1)
        # Pinned, so that the copy does not wait; nobody writes it again before the step's answer has been waited for.
        self._told_from = torch.zeros(3, rows, dtype=torch.long, pin_memory=device.type == "cuda")

    def tell(self, tokens: Sequence[int], positions: Sequence[int], *, scratch: int) -> None:
        """Rows beyond these only fill the batch: they write to the scratch column, and see their own first one."""
        rows = len(tokens)
        told = self._told_from
        told[:2].zero_()
        told[2].fill_(scratch)
        told[:, :rows] = torch.tensor([tokens, positions, positions])
        self.told.copy_(told, non_blocking=True)

    def tensors(self) -> list[Tensor]:
        return [self.told, self.token_logits, self.row_index]


class StaticStep:
    """The model's forward over the first rows of the slot backend, from buffers to buffers.

    Its shapes follow from the bucket alone, and nothing in it looks at a tensor from the host.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        kv: SlotBackend,
        buffers: StepBuffers,
        batch: TableBatch,
        *,
        takes_positions: bool,
        keeps_last_logits: bool,
    ) -> None:
        self._adapted = adapted
        self._kv = kv
        self._buffers = buffers
        self._batch = batch
        self._takes_positions = takes_positions
        self._keeps_last_logits = keeps_last_logits

    @torch.inference_mode()
    def run(self, bucket: Bucket) -> None:
        buffers = self._buffers
        tokens, positions, columns = (told[: bucket.rows].unsqueeze(1) for told in buffers.told.unbind())
        inputs = self._kv.decode_inputs(positions, columns, buffers.row_index[: bucket.rows], bucket.columns)
        arguments: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        if self._keeps_last_logits:
            arguments["logits_to_keep"] = 1
        with self._adapted.using(self._batch):
            output = self._adapted.model(
                input_ids=tokens, attention_mask=inputs.mask, past_key_values=inputs.cache, use_cache=True, **arguments
            )
        buffers.token_logits[: bucket.rows].copy_(output.logits[:, -1])
