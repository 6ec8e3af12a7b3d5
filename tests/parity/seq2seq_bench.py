"""An engine over a tiny encoder-decoder, what it answers, and what PEFT does."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from service.engine.base_model import LoadedBase, load_base
from service.engine.build import EngineOptions, build_engine
from service.engine.engine import BatchEngine
from service.engine.events import Event, FailedEvent, FinishedEvent, FinishReason, TokenEvent, TokenLogprob
from service.engine.selection import Mode, SelectedAdapter, Selection
from service.engine.sequence import GenerationRequest, SamplingParams
from service.engine.task import Task
from tests.seq2seq_factory import (
    Seq2SeqArch,
    Seq2SeqSpec,
    blended,
    make_seq2seq_adapter,
    peft_generated,
    peft_loaded,
    save_seq2seq,
    shared_model,
)

TOKENS = 12
PENALTY = 1.7  # so that tiny models say more than one word
KV_BYTES = 2 * 2 * 32 * 4  # of one token, of a prompt's as of an output's: two layers of 32 features
PROMPTS = [[(7 * i + j) % 256 for j in range(length)] for i, length in enumerate((3, 17, 1, 30, 9, 24, 2))]


@dataclass
class Answer:
    """What one request was told, of its only choice."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None
    end: FinishedEvent | FailedEvent | None = None


@dataclass
class Bench:
    """A model with adapters on disk, and engines over them. `forwards` are their rows, those of prompts as negative."""

    model: PreTrainedModel
    folder: Path
    adapters: dict[str, Path]
    digests: dict[str, str] = field(default_factory=dict)
    forwards: list[int] = field(default_factory=list)
    base: LoadedBase | None = None
    quantization: str = "none"

    @contextmanager
    def engine(self, *, started: bool = True, **options: Any) -> Iterator[BatchEngine]:
        """Not `started`, what is submitted before it is makes one batch: the adapters are loaded."""
        with ExitStack() as opened:
            self.base = load_base(
                str(self.folder / "base"), device="cpu", task=Task.SEQ2SEQ, quantization=self.quantization
            )
            store = AdapterStore(self.folder / f"data-{len(list(self.folder.iterdir()))}")
            opened.callback(store.close)
            registry = AdapterRegistry(
                store, self.base.adapted, self.base.identity, factor_budget=1 << 24, device=torch.device("cpu")
            )
            for name, path in self.adapters.items():
                with store.staging() as staged:
                    shutil.copytree(path, staged, dirs_exist_ok=True)
                    self.digests[name] = registry.register("", name, staged).digest
            engine = build_engine(self.base, registry, EngineOptions(**options))
            self._watch(engine)
            opened.callback(engine.stop)
            if started:
                engine.start()
            else:
                for digest in self.digests.values():
                    registry.pin(digest)
                    opened.callback(registry.unpin, digest)
            yield engine
            engine.stop()
            if not started:
                return
            assert all(registry.status(digest).pins == 0 for digest in self.digests.values())

    def _watch(self, engine: BatchEngine) -> None:
        runner: Any = engine._worker._runner  # type: ignore[attr-defined]
        read, decode = runner._read, runner._decode

        def watched(run: Callable[..., Tensor], sign: int) -> Callable[..., Tensor]:
            def inner(rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
                self.forwards.append(sign * len(rows))
                return run(rows, tokens)

            return inner

        runner._read, runner._decode = watched(read, -1), watched(decode, 1)

    def request(
        self, name: str, weights: Mapping[str, float], prompt: Sequence[int], mode: Mode = Mode.SWITCH, **params: Any
    ) -> GenerationRequest:
        selection = Selection(tuple(SelectedAdapter(n, self.digests[n], w) for n, w in weights.items()), mode)
        given = {"max_new_tokens": TOKENS, "temperature": 0.0, "logprobs": 0, **params}
        return GenerationRequest(name, tuple(prompt), SamplingParams(**given), selection, task=Task.SEQ2SEQ)

    def reference(self, weights: Mapping[str, float]) -> Any:
        """PEFT's own model of one adapter; of a blend, the base with PEFT's deltas added."""
        if len(weights) == 1 and (name := next(iter(weights))) and weights[name] == 1.0:
            return peft_loaded(self.model, self.adapters[name])
        return blended(self.model, {self.adapters[name]: weight for name, weight in weights.items()})


def make_bench(arch: Seq2SeqArch, folder: Path, adapters: int = 4, **spec: Any) -> Bench:
    save_seq2seq(shared_model(arch), folder / "base")
    # Read back: some tables of positions are computed, and not in the files.
    model = type(shared_model(arch)).from_pretrained(folder / "base").eval()
    paths = {
        f"a{i}": make_seq2seq_adapter(model, Seq2SeqSpec(compact=i % 2 == 0, seed=i, **spec), folder / f"a{i}")
        for i in range(adapters)
    }
    return Bench(model, folder, paths)


def submit(engine: BatchEngine, requests: Sequence[GenerationRequest]) -> Callable[[], list[Answer]]:
    """Submits all at once; what is returned waits for every end."""
    events: queue.Queue[Event] = queue.Queue()
    engine.submit(requests, events.put)

    def wait() -> list[Answer]:
        answers = {request.request_id: Answer() for request in requests}
        while any(answer.end is None for answer in answers.values()):
            event = events.get(timeout=60)
            answer = answers[event.request_id]
            assert answer.end is None, "nothing after the end"
            if isinstance(event, TokenEvent):
                answer.tokens += event.token_ids
                answer.logprobs += event.logprobs
                answer.reason = event.finish_reason
            elif isinstance(event, FinishedEvent | FailedEvent):
                answer.end = event
        return list(answers.values())

    return wait


def ask(engine: BatchEngine, requests: Sequence[GenerationRequest]) -> list[Answer]:
    wait = submit(engine, requests)
    if not engine._thread.is_alive():
        engine.start()
    return wait()


@torch.inference_mode()
def peft_logprobs(loaded: Any, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """Of every token of an output, in one forward without any cache."""
    start = loaded.generation_config.decoder_start_token_id
    ids = torch.tensor([[start, *output[:-1]]])
    logits: Tensor = loaded(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=ids, use_cache=False).logits[0]
    chosen: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(output)[:, None])[:, 0].tolist()
    return chosen


def check(bench: Bench, weights: Mapping[str, float], prompt: Sequence[int], answer: Answer, **options: Any) -> None:
    loaded = bench.reference(weights)
    expected = peft_generated(loaded, prompt, options.pop("tokens", TOKENS), **options)
    assert isinstance(answer.end, FinishedEvent), answer.end
    assert answer.tokens == expected, (weights, prompt)
    likely = [each.logprob for each in answer.logprobs]
    assert likely == pytest.approx(peft_logprobs(loaded, prompt, expected), abs=2e-4)
