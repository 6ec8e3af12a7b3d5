"""PEFT and `generate` behind an HTTP route: the server that one writes in an afternoon.

    python -m benchmarks.contenders.peft_app --base DIR --adapter NAME=DIR --port N [--threads 2] [--batch 1]

One thread owns the model. It takes the request that has waited longest, and with it as many others of the same adapter
as `--batch` allows, switches PEFT to that adapter, and generates for them in one left-padded batch. A batch of one is a
lock and a `set_adapter` for every request. Tokens are streamed as `generate` finds them; rows that have all they asked
for go on unseen until the longest of their batch is done.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.contenders.wire import Job, named, parser_of, serve
from service.engine.threads import compute_with, in_own_thread

_PADDING = 0

log = logging.getLogger(__name__)


def load(base: Path, adapters: Mapping[str, str]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    (first, directory), *others = adapters.items()
    peft = PeftModel.from_pretrained(model, directory, adapter_name=first)
    for name, directory in others:
        peft.load_adapter(directory, adapter_name=name)
    return peft.eval()


class PeftWorker:
    """The thread that generates, and the requests that wait for it."""

    def __init__(self, model: Any, batch: int, threads: int) -> None:
        self._model = model
        self._batch = batch
        self._threads = threads
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, job: Job) -> None:
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def _run(self) -> None:
        compute_with(self._threads)
        while True:
            jobs = self._take()
            try:
                self._generate(jobs)
            except Exception:
                log.exception("a batch failed")
                for job in jobs:
                    job.put(None)

    def _take(self) -> list[Job]:
        """The request that waited longest, and the next of its adapter's."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            adapter = self._waiting[0].asked.adapter
            jobs = [job for job in self._waiting if job.asked.adapter == adapter][: self._batch]
            for job in jobs:
                self._waiting.remove(job)
            return jobs

    @torch.inference_mode()
    def _generate(self, jobs: list[Job]) -> None:
        self._model.set_adapter(jobs[0].asked.adapter)
        length = max(len(job.asked.prompt) for job in jobs)
        padding = [length - len(job.asked.prompt) for job in jobs]
        longest = max(job.asked.max_new_tokens for job in jobs)
        self._model.generate(
            input_ids=torch.tensor([[_PADDING] * n + job.asked.prompt for n, job in zip(padding, jobs, strict=True)]),
            attention_mask=torch.tensor([[0] * n + [1] * (length - n) for n in padding]),
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            streamer=_Streamer(jobs),
        )


class _Streamer(BaseStreamer):
    """Hands every row's new token to its request; the first that `generate` puts is the prompts."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs
        self._step = -1

    def put(self, value: Tensor) -> None:
        if self._step >= 0:
            for job, token in zip(self._jobs, value.flatten().tolist(), strict=True):
                if self._step < job.asked.max_new_tokens:
                    job.put(token)
        self._step += 1

    def end(self) -> None:
        pass


def main() -> None:
    parser = parser_of("peft_app")
    parser.add_argument("--batch", type=int, default=1, help="requests of one adapter that may run together (1)")
    options = parser.parse_args()
    compute_with(1)
    model = in_own_thread(options.threads, partial(load, options.base, named(options.adapter)))
    serve(PeftWorker(model, options.batch, options.threads).submit, options.port)


if __name__ == "__main__":
    main()
