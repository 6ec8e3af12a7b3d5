"""transformers' continuous batching behind an HTTP route, with one adapter merged into the weights.

    python -m benchmarks.contenders.continuous_app --base DIR --adapter NAME=DIR --port N [--threads 2]

It knows one adapter and answers every request with that one: PEFT folds it in when the app starts. Blocks are small and
few, for a CPU: its own choice is made for the memory of a GPU. Prompts never repeat, so it shares no blocks.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.contenders.wire import Job, named, parser_of, serve
from service.engine.threads import compute_with, in_own_thread

_PAGE_TOKENS = 32
_BLOCKS = 256
_BATCH_TOKENS = 512


def load(base: Path, adapter: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


def start(model: Any) -> Any:
    """The manager, whose thread computes with as many threads as are the default when it starts."""
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS,
            num_blocks=_BLOCKS,
            max_batch_tokens=_BATCH_TOKENS,
            allow_block_sharing=False,
        ),
    )
    manager.start()
    return manager


def submit(manager: Any, job: Job) -> None:
    name = uuid4().hex
    sent = 0

    def take(output: Any) -> None:
        """Called on the event loop with all tokens so far."""
        nonlocal sent
        for token in output.generated_tokens[sent:]:
            job.tokens.put_nowait(token)
        sent = len(output.generated_tokens)
        if output.error is not None:
            job.tokens.put_nowait(None)

    manager.register_result_handler(name, take)
    manager.add_request(job.asked.prompt, request_id=name, max_new_tokens=job.asked.max_new_tokens, streaming=True)


def main() -> None:
    options = parser_of("continuous_app").parse_args()
    (adapter,) = named(options.adapter).values()
    compute_with(1)
    model = in_own_thread(options.threads, partial(load, options.base, adapter))
    torch.set_num_threads(options.threads)
    manager = start(model)
    try:
        serve(partial(submit, manager), options.port)
    finally:
        manager.stop(hard_stop=True)


if __name__ == "__main__":
    main()
