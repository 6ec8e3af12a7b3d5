"""The same requests answered with PEFT and `generate`: one by one, and adapter by adapter in padded batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from service.engine.sequence import GenerationRequest
from service.engine.threads import in_own_thread

_PADDING = 0


class PeftBaseline:
    """One model with every adapter loaded, of which PEFT runs one at a time."""

    def __init__(self, base: Path, adapters: Mapping[str, Path], device: torch.device, threads: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
        (first, directory), *others = adapters.items()
        self._model: Any = PeftModel.from_pretrained(model, str(directory), adapter_name=first)
        for name, directory in others:
            self._model.load_adapter(str(directory), adapter_name=name)
        self._model.eval()
        self._device = device
        self._threads = threads

    def one_by_one(self, requests: Sequence[GenerationRequest]) -> dict[str, list[int]]:
        return in_own_thread(self._threads, lambda: {one.request_id: self._generate([one])[0] for one in requests})

    def by_adapter(self, requests: Sequence[GenerationRequest], batch_size: int) -> dict[str, list[int]]:
        """Batches share an adapter, and run as long as their longest request."""
        return in_own_thread(self._threads, lambda: self._by_adapter(requests, batch_size))

    def _by_adapter(self, requests: Sequence[GenerationRequest], batch_size: int) -> dict[str, list[int]]:
        waiting: dict[str, list[GenerationRequest]] = defaultdict(list)
        for request in requests:
            waiting[_adapter(request)].append(request)
        answers: dict[str, list[int]] = {}
        for of_adapter in waiting.values():
            for start in range(0, len(of_adapter), batch_size):
                batch = of_adapter[start : start + batch_size]
                answers.update(zip((request.request_id for request in batch), self._generate(batch), strict=True))
        return answers

    @torch.inference_mode()
    def _generate(self, batch: Sequence[GenerationRequest]) -> list[list[int]]:
        """The tokens that each request of one adapter asked for."""
        self._model.set_adapter(_adapter(batch[0]))
        length = max(len(request.prompt_ids) for request in batch)
        padding = [length - len(request.prompt_ids) for request in batch]
        ids = [[_PADDING] * n + list(request.prompt_ids) for n, request in zip(padding, batch, strict=True)]
        mask = [[0] * n + [1] * (length - n) for n in padding]
        longest = max(request.params.max_new_tokens for request in batch)
        output = self._model.generate(
            input_ids=torch.tensor(ids, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
        )
        new = output[:, length:].tolist()
        return [row[: request.params.max_new_tokens] for row, request in zip(new, batch, strict=True)]


def _adapter(request: GenerationRequest) -> str:
    (adapter,) = request.selection.adapters
    return adapter.name
