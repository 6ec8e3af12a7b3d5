"""Encoder-decoders through the engine against PEFT's `generate(do_sample=False)`, each text alone.

Adapters on encoder, decoder and cross-attention, of both storages, mixed in one batch that rows join and leave.
"""

from __future__ import annotations

import json
import queue
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.errors import UnsupportedCheckpoint
from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from service.engine.base_model import BaseModelError, LoadedBase, load_base, load_pretrained
from service.engine.build import EngineOptions, build_engine
from service.engine.engine import BatchEngine
from service.engine.errors import InvalidRequest, OutputTooLong, PromptTooLong, WrongTask
from service.engine.events import Event, FailedEvent, FinishedEvent, FinishReason, TokenEvent, TokenLogprob
from service.engine.selection import Mode, SelectedAdapter, Selection
from service.engine.seq2seq import positions
from service.engine.sequence import GenerationRequest, SamplingParams
from service.engine.task import Task
from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.seq2seq_factory import (
    CONTEXT,
    MORE_ARCHS,
    SEQ2SEQ_ARCHS,
    Seq2SeqArch,
    Seq2SeqSpec,
    blended,
    make_seq2seq_adapter,
    peft_generated,
    peft_loaded,
    save_seq2seq,
    shared_model,
    tiny_seq2seq,
)

TOKENS = 12
PENALTY = 1.7  # so that tiny models say more than one word
KV_BYTES = 2 * 2 * 32 * 4  # of one token, of a prompt's as of an output's: two layers of 32 features
SELECTIONS: list[dict[str, float]] = [
    {},
    {"a0": 1.0},
    {"a1": 1.0},
    {"a2": 1.0},
    {"a3": 1.0},
    {"a0": 0.6, "a1": 0.4},
    {"a2": -0.5, "a3": 1.2},
]
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


@pytest.mark.parametrize("arch", SEQ2SEQ_ARCHS)
def test_mixed_in_one_batch_they_are_pefts(arch: Seq2SeqArch, tmp_path: Path) -> None:
    bench = make_bench(arch, tmp_path)
    with bench.engine(started=False) as engine:
        requests = [
            bench.request(f"r{i}", weights, prompt, repetition_penalty=PENALTY if i % 2 else 1.0)
            for i, (weights, prompt) in enumerate(zip(SELECTIONS, PROMPTS, strict=True))
        ]
        answers = ask(engine, requests)
    assert bench.forwards[0] == -len(SELECTIONS), "the prompts were not read together"
    unended = sum(len(answer.tokens) > 1 for answer in answers)
    assert max(bench.forwards) == unended >= 6, "the rows were not decoded together"
    for i, (weights, prompt, answer) in enumerate(zip(SELECTIONS, PROMPTS, answers, strict=True)):
        check(bench, weights, prompt, answer, repetition_penalty=PENALTY if i % 2 else 1.0)
    texts = {tuple(answer.tokens) for answer in answers}
    assert len(texts) == len(SELECTIONS), "the adapters must show"
    assert len({token for text in texts for token in text}) > 12, "so must the steps"


@pytest.mark.parametrize("arch", [*SEQ2SEQ_ARCHS, *MORE_ARCHS])
def test_rows_join_and_leave_in_mid_flight(arch: Seq2SeqArch, tmp_path: Path) -> None:
    """A batch of three, prompts read a few at a time, outputs of every length: rows join beside others further on."""
    bench = make_bench(arch, tmp_path)
    draw = random.Random(0)
    with bench.engine(max_batch_size=3, prefill_tokens=20) as engine:
        asked = []
        for i in range(24):
            weights, prompt = SELECTIONS[i % len(SELECTIONS)], [draw.randrange(256) for _ in range(draw.randint(1, 40))]
            asked.append((weights, prompt, draw.randint(1, 20)))
        requests = [
            bench.request(f"r{i}", weights, prompt, max_new_tokens=tokens, repetition_penalty=PENALTY)
            for i, (weights, prompt, tokens) in enumerate(asked)
        ]
        answers = ask(engine, requests)
        engine.stop()  # the last step is over then
        used, budget = engine.stats().kv_bytes, engine.stats().kv_budget_bytes
    assert (used, budget) == (0, 2 << 30), "what is held of prompts must go with its row"
    together = [rows for rows in bench.forwards if rows > 0]
    assert max(together) > 1, "they ran one at a time"
    assert len(bench.forwards) > len(together) > 20
    for (weights, prompt, tokens), answer in zip(asked, answers, strict=True):
        check(bench, weights, prompt, answer, tokens=tokens, repetition_penalty=PENALTY)


@pytest.mark.parametrize("arch", SEQ2SEQ_ARCHS)
def test_folded_it_says_the_same(arch: Seq2SeqArch, tmp_path: Path) -> None:
    bench = make_bench(arch, tmp_path, adapters=1)
    with bench.engine() as engine:
        assert bench.base is not None
        parameters = dict(bench.base.adapted.model.named_parameters())
        pristine = {name: parameter.clone() for name, parameter in parameters.items() if not parameter.is_meta}
        requests = [bench.request(f"r{i}", {"a0": 1.0}, prompt, Mode.MERGE) for i, prompt in enumerate(PROMPTS)]
        answers = ask(engine, requests)
        assert engine.stats().folds == 1
        (base,) = ask(engine, [bench.request("base", {}, PROMPTS[0])])
        assert all(torch.equal(parameters[name], own) for name, own in pristine.items())
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert isinstance(answer.end, FinishedEvent)
        assert answer.end.mode == "merge"
        check(bench, {"a0": 1.0}, prompt, answer)
    check(bench, {}, PROMPTS[0], base)


@pytest.mark.parametrize(
    ("arch", "spec"),
    [
        ("bart", {"bias": "all"}),
        ("bart", {"bias": "vblora_only"}),
        ("bart", {"modules_to_save": ("lm_head", "layernorm_embedding")}),
        ("t5", {"modules_to_save": ("lm_head", "final_layer_norm")}),
        ("t5", {"target_modules": ("q", "v", "lm_head")}),
        ("bart", {"modules_to_save": ("decoder.embed_tokens",)}),
    ],
)
def test_biases_and_saved_modules_are_each_rows_own(arch: Seq2SeqArch, spec: dict[str, Any], tmp_path: Path) -> None:
    bench = make_bench(arch, tmp_path, adapters=3, **spec)
    rows = [{"a0": 1.0}, {}, {"a1": 1.0}, {"a2": 1.0}]
    with bench.engine(started=False) as engine:
        requests = [
            bench.request(f"r{i}", weights, prompt)
            for i, (weights, prompt) in enumerate(zip(rows, PROMPTS, strict=False))
        ]
        answers = ask(engine, requests)
    assert bench.forwards[0] == -len(rows)
    for weights, prompt, answer in zip(rows, PROMPTS, answers, strict=False):
        check(bench, weights, prompt, answer)


def test_what_t5_looks_up_once_for_all_rows_cannot_be_a_rows_own(tmp_path: Path) -> None:
    bench = make_bench("t5", tmp_path, adapters=1, modules_to_save=("relative_attention_bias",))
    with pytest.raises(UnsupportedCheckpoint, match=r"relative_attention_bias.*once for all rows"), bench.engine():
        pass


class TestWhatTheFilesSayOfOutputs:
    def rewritten(self, bench: Bench, **fields: Any) -> Bench:
        """The base with other fields in its generation config."""
        path = bench.folder / "base" / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        bench.model = type(bench.model).from_pretrained(bench.folder / "base").eval()
        return bench

    @pytest.mark.parametrize("arch", ["t5", "bart"])
    def test_an_end_ends_an_output(self, arch: Seq2SeqArch, tmp_path: Path) -> None:
        bench = make_bench(arch, tmp_path, adapters=1)
        whole = peft_generated(bench.model, PROMPTS[1], TOKENS, repetition_penalty=PENALTY)
        end = next(token for token in whole[3:] if token not in whole[:3])
        self.rewritten(bench, eos_token_id=[257, end])
        with bench.engine() as engine:
            requests = [bench.request("r", {}, PROMPTS[1], repetition_penalty=PENALTY)]
            requests.append(bench.request("on", {}, PROMPTS[1], repetition_penalty=PENALTY, ignore_eos=True))
            answer, on = ask(engine, requests)
        assert answer.reason is FinishReason.STOP
        assert answer.tokens == whole[: whole.index(end) + 1]
        assert answer.tokens == peft_generated(bench.model, PROMPTS[1], TOKENS, repetition_penalty=PENALTY)
        assert (on.tokens, on.reason) == (whole, FinishReason.LENGTH)

    @pytest.mark.parametrize("arch", ["t5", "bart"])
    def test_a_forced_beginning_and_words_that_are_never_said(self, arch: Seq2SeqArch, tmp_path: Path) -> None:
        bench = make_bench(arch, tmp_path, adapters=2)
        said = peft_generated(bench.model, PROMPTS[0], TOKENS)
        rules = {"forced_bos_token_id": 65, "bad_words_ids": [[said[-1]], [257]], "suppress_tokens": [said[0], 66]}
        self.rewritten(bench, **rules)
        rows: list[dict[str, float]] = [{}, {"a0": 1.0}, {"a1": 1.0}]
        with bench.engine() as engine:
            requests = [bench.request(f"r{i}", weights, PROMPTS[i]) for i, weights in enumerate(rows)]
            answers = ask(engine, requests)
        for i, weights in enumerate(rows):
            path = next((bench.adapters[name] for name in weights), None)
            expected = peft_generated(peft_loaded(bench.model, path), PROMPTS[i], TOKENS)
            assert answers[i].tokens == expected
            assert expected[0] == 65
            assert answers[i].logprobs[0].logprob == 0.0, "there was no other"

    def test_another_start(self, tmp_path: Path) -> None:
        bench = make_bench("bart", tmp_path, adapters=1)
        before = peft_generated(bench.model, PROMPTS[1], TOKENS, repetition_penalty=PENALTY)
        self.rewritten(bench, decoder_start_token_id=33)
        with bench.engine() as engine:
            (answer,) = ask(engine, [bench.request("r", {}, PROMPTS[1], repetition_penalty=PENALTY)])
        after = peft_generated(bench.model, PROMPTS[1], TOKENS, repetition_penalty=PENALTY)
        assert answer.tokens == after != before

    def test_none_is_refused(self, tmp_path: Path) -> None:
        bench = make_bench("bart", tmp_path, adapters=0)
        for name in ("generation_config.json", "config.json"):
            path = bench.folder / "base" / name
            fields = json.loads(path.read_text())
            path.write_text(json.dumps({**fields, "decoder_start_token_id": None, "bos_token_id": None}))
        with pytest.raises(BaseModelError, match="name no decoder_start_token_id"), bench.engine():
            pass


@pytest.mark.parametrize("arch", SEQ2SEQ_ARCHS)
def test_a_seed_says_the_same_alone_and_in_any_batch(arch: Seq2SeqArch, tmp_path: Path) -> None:
    bench = make_bench(arch, tmp_path, adapters=2)
    with bench.engine() as engine:
        drawn = {"temperature": 1.0, "seed": 5}
        (alone,) = ask(engine, [bench.request("alone", {"a0": 1.0}, PROMPTS[0], **drawn)])
        rows = [bench.request(f"r{i}", {"a1": 1.0}, prompt, temperature=0.7) for i, prompt in enumerate(PROMPTS)]
        beside = ask(engine, [*rows, bench.request("beside", {"a0": 1.0}, PROMPTS[0], **drawn)])[-1]
    assert alone.tokens == beside.tokens
    assert len(set(alone.tokens)) > 3


class TestLengthsAndMemory:
    def test_both_sides_have_their_own_limit(self, tmp_path: Path) -> None:
        bench = make_bench("bart", tmp_path, adapters=1)
        with bench.engine() as engine:
            longest = bench.request("r", {"a0": 1.0}, [*range(CONTEXT)], max_new_tokens=CONTEXT)
            (answer,) = ask(engine, [longest])
            with pytest.raises(PromptTooLong, match="encoder reads at most 96 tokens and the prompt has 97") as prompt:
                engine.submit([bench.request("p", {}, [1] * 97, max_new_tokens=1)], lambda event: None)
            with pytest.raises(
                OutputTooLong, match=r"decoder writes at most 96 tokens.*max_new_tokens is 97"
            ) as output:
                engine.submit([bench.request("o", {}, [1], max_new_tokens=97)], lambda event: None)
        check(bench, {"a0": 1.0}, longest.prompt_ids, answer, tokens=CONTEXT)
        assert (prompt.value.param, output.value.param) == ("prompt", "max_new_tokens")
        with bench.engine(max_context=40) as engine:
            assert engine.max_context == 40
            with pytest.raises(OutputTooLong, match="at most 40"):
                engine.submit([bench.request("o", {}, [1] * 40, max_new_tokens=41)], lambda event: None)
        with (
            pytest.raises(BaseModelError, match="max_context is 97 but the model's is 96"),
            bench.engine(max_context=97),
        ):
            pass

    def test_relative_positions_go_beyond_what_files_name(self, tmp_path: Path) -> None:
        bench = make_bench("t5", tmp_path, adapters=1)
        path = bench.folder / "base" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "n_positions": 20}))
        with bench.engine() as engine:
            assert engine.max_context == 20
        with bench.engine(max_context=200) as engine:
            request = bench.request("r", {"a0": 1.0}, [i % 250 for i in range(200)])
            (answer,) = ask(engine, [request])
        check(bench, {"a0": 1.0}, request.prompt_ids, answer)

    def test_memory_is_for_prompts_and_outputs(self, tmp_path: Path) -> None:
        """Rows of 30 and 12 tokens, and memory for two and a half of them: no more run together."""
        bench = make_bench("bart", tmp_path, adapters=2)
        row = (30 + TOKENS) * KV_BYTES
        with bench.engine(kv_memory=5 * row // 2) as engine:
            prompts = [[i * 7 % 250 for i in range(k, k + 30)] for k in range(6)]
            names = ["a0", "a1"] * 3
            most = 0
            requests = [bench.request(f"r{i}", {names[i]: 1.0}, prompt) for i, prompt in enumerate(prompts)]
            runner: Any = engine._worker._runner  # type: ignore[attr-defined]
            keep = runner.keep

            def watched(rows: Sequence[int]) -> None:
                nonlocal most
                most = max(most, runner.kv_bytes[0])
                keep(rows)

            runner.keep = watched
            answers = ask(engine, requests)
            with pytest.raises(InvalidRequest, match="more memory than --kv-memory allows"):
                engine.submit([bench.request("l", {}, [1] * 90, max_new_tokens=90)], lambda event: None)
            # A prompt's tokens and an output's do not stand for each other: 80 and 10 fit, as 10 and 80 do.
            ask(engine, [bench.request("p", {}, [1] * 80, max_new_tokens=10)])
            ask(engine, [bench.request("o", {}, [1] * 10, max_new_tokens=80)])
        assert max(bench.forwards) == 2
        assert 2 * (30 + TOKENS - 1) * KV_BYTES <= most <= 5 * row // 2
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            check(bench, {names[i]: 1.0}, prompt, answer)


class TestWhenThingsGoWrong:
    def test_a_forward_that_fails_takes_its_own_request_alone(self, tmp_path: Path) -> None:
        bench = make_bench("t5", tmp_path, adapters=2)
        with bench.engine() as engine:
            assert bench.base is not None
            embed: Any = bench.base.adapted.model.encoder.embed_tokens  # type: ignore[union-attr]

            def fail(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if (inputs[0] == 251).any():
                    raise RuntimeError("the forward failed, as it was told to")

            embed.register_forward_pre_hook(fail)
            rows = [(PROMPTS[0], "a0"), ([5, 251, 6], "a1"), (PROMPTS[1], "a1"), (PROMPTS[3], "a0")]
            requests = [bench.request(f"r{i}", {name: 1.0}, prompt) for i, (prompt, name) in enumerate(rows)]
            answers = ask(engine, requests)
        assert isinstance(answers[1].end, FailedEvent)
        for i in (0, 2, 3):
            check(bench, {rows[i][1]: 1.0}, rows[i][0], answers[i])

    def test_a_decode_step_that_fails_leaves_the_others_as_they_were(self, tmp_path: Path) -> None:
        """The same forward is tried again in halves: nothing of the first try may stay behind."""
        bench = make_bench("bart", tmp_path, adapters=2)
        with bench.engine() as engine:
            assert bench.base is not None
            layer: Any = bench.base.adapted.model.model.decoder.layers[1].fc2  # type: ignore[union-attr]
            failures = 0

            def fail_once(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                nonlocal failures
                if len(inputs[0]) == 4 and failures < 3 and bench.forwards[-1] > 0:
                    failures += 1
                    raise RuntimeError("the forward failed, as it was told to")

            layer.register_forward_pre_hook(fail_once)
            names = ["a0", "a1", "a0", "a1"]
            requests = [bench.request(f"r{i}", {name: 1.0}, PROMPTS[i]) for i, name in enumerate(names)]
            answers = ask(engine, requests)
        assert failures == 3
        for i, name in enumerate(names):
            check(bench, {name: 1.0}, PROMPTS[i], answers[i])

    def test_a_request_that_is_cancelled_leaves_the_others_as_they_were(self, tmp_path: Path) -> None:
        bench = make_bench("bart", tmp_path, adapters=2)
        with bench.engine() as engine:
            events: queue.Queue[Event] = queue.Queue()
            engine.submit([bench.request("gone", {"a0": 1.0}, PROMPTS[3], max_new_tokens=90)], events.put)
            events.get(timeout=60)
            wait = submit(engine, [bench.request(f"r{i}", {"a1": 1.0}, PROMPTS[i]) for i in range(4)])
            engine.cancel("gone")
            answers = wait()
            last = [events.get(timeout=60)]
            while not isinstance(last[-1], FinishedEvent):
                last.append(events.get(timeout=60))
            assert isinstance(last[-2], TokenEvent)
            assert last[-2].finish_reason is FinishReason.CANCELLED
        for prompt, answer in zip(PROMPTS, answers, strict=False):
            check(bench, {"a1": 1.0}, prompt, answer)

    def test_decoders_whose_positions_cannot_be_told_run_one_row_at_a_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The self-test finds out, and what is said is right all the same."""
        monkeypatch.setattr(positions.RowPositions, "__init__", _no_positions)
        bench = make_bench("bart", tmp_path, adapters=2)
        with bench.engine() as engine:
            assert engine.kv_backend == "solo"
            requests = [bench.request(f"r{i}", {f"a{i % 2}": 1.0}, prompt) for i, prompt in enumerate(PROMPTS[:4])]
            answers = ask(engine, requests)
        assert {*bench.forwards} == {1, -1}
        for i, (prompt, answer) in enumerate(zip(PROMPTS[:4], answers, strict=True)):
            check(bench, {f"a{i % 2}": 1.0}, prompt, answer)

    def test_bases_of_another_kind_say_which_task_is_theirs(self, tmp_path: Path) -> None:
        bench = make_bench("t5", tmp_path, adapters=0)
        save_model(tiny_model("llama"), tmp_path / "llama")
        with pytest.raises(BaseModelError, match="encoder-decoders: start the server with --task seq2seq"):
            load_base(str(tmp_path / "base"), device="cpu")
        with pytest.raises(BaseModelError, match=r"llama models have no encoder.*--task generate"):
            load_base(str(tmp_path / "llama"), device="cpu", task=Task.SEQ2SEQ)
        request = GenerationRequest("r", (1,), SamplingParams(), Selection())
        with bench.engine() as engine, pytest.raises(WrongTask):
            engine.submit([request], lambda event: None)

    def test_an_adapter_of_a_decoder_does_not_bind(self, tmp_path: Path) -> None:
        bench = make_bench("t5", tmp_path, adapters=0)
        bench.adapters["foreign"] = make_adapter(tiny_model("llama"), AdapterSpec(), tmp_path / "foreign")
        with pytest.raises(Exception, match="q_proj"), bench.engine():
            pass


def _no_positions(self: positions.RowPositions, decoder: nn.Module) -> None:
    self._positions = None


@pytest.mark.parametrize("arch", ["t5", "bart"])
def test_a_flood_with_a_short_memory_is_answered_right(arch: Seq2SeqArch, tmp_path: Path) -> None:
    """From several threads' worth of submissions, with joins, waits for memory and ends of every kind."""
    bench = make_bench(arch, tmp_path)
    draw = random.Random(1)
    with bench.engine(max_batch_size=5, prefill_tokens=64, kv_memory=400 * KV_BYTES, max_queue=200) as engine:
        asked, waits = [], []
        for i in range(60):
            weights = draw.choice(SELECTIONS)
            prompt = [draw.randrange(256) for _ in range(draw.choice([1, 2, 5, 20, 45]))]
            tokens = draw.choice([1, 2, 7, 15])
            asked.append((weights, prompt, tokens))
            waits.append(submit(engine, [bench.request(f"r{i}", weights, prompt, max_new_tokens=tokens)]))
        answers = [wait()[0] for wait in waits]
        engine.stop()
        assert engine.stats().kv_bytes == 0
        assert engine.stats().running == engine.stats().waiting == 0
    references: dict[str, Any] = {}
    for (weights, prompt, tokens), answer in zip(asked, answers, strict=True):
        key = str(weights)
        loaded = references.setdefault(key, bench.reference(weights))
        assert answer.tokens == peft_generated(loaded, prompt, tokens)


def test_layers_of_unequal_number_on_both_sides(tmp_path: Path) -> None:
    """`generate` itself cannot, as it makes the cache for the encoder's layers; the model's forward can."""
    model = tiny_seq2seq("t5", num_decoder_layers=3)
    save_seq2seq(model, tmp_path / "base")
    path = make_seq2seq_adapter(model, Seq2SeqSpec(seed=4), tmp_path / "a")
    bench = Bench(model, tmp_path, {"a": path})
    with bench.engine() as engine:
        requests = [bench.request(f"r{i}", {"a": 1.0}, prompt) for i, prompt in enumerate(PROMPTS)]
        answers = ask(engine, requests)
    loaded = peft_loaded(model, path)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        likely = [each.logprob for each in answer.logprobs]
        assert likely == pytest.approx(peft_logprobs(loaded, prompt, answer.tokens), abs=2e-4)
        with torch.inference_mode():
            ids = torch.tensor([[model.config.decoder_start_token_id, *answer.tokens[:-1]]])
            best = loaded(input_ids=torch.tensor([prompt]), decoder_input_ids=ids, use_cache=False).logits[0].argmax(-1)
        assert best.tolist() == answer.tokens


@pytest.mark.parametrize("how", ["int8", "nf4"])
@pytest.mark.parametrize("arch", SEQ2SEQ_ARCHS)
def test_over_a_quantized_base_they_are_pefts(arch: Seq2SeqArch, how: str, tmp_path: Path) -> None:
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[how])
    wide = {"d_kv": 16, "d_ff": 128} if arch != "bart" else {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    model = tiny_seq2seq(arch, d_model=64, **wide)
    save_seq2seq(model, tmp_path / "base")
    paths = {f"a{i}": make_seq2seq_adapter(model, Seq2SeqSpec(seed=i), tmp_path / f"a{i}") for i in range(2)}
    bench = Bench(model, tmp_path, paths, quantization=how)
    rows: list[str | None] = ["a0", None, "a1", "a0"]
    with bench.engine(started=False) as engine:
        asked = zip(rows, PROMPTS, strict=False)
        requests = [bench.request(f"r{i}", {} if n is None else {n: 1.0}, p) for i, (n, p) in enumerate(asked)]
        answers = ask(engine, requests)
        assert bench.base is not None
        assert bench.base.quantization == how
    assert bench.forwards[0] == -len(rows)
    for name, prompt, answer in zip(rows, PROMPTS, answers, strict=False):
        plain = load_pretrained(
            str(tmp_path / "base"), dtype="float32", device=torch.device("cpu"), quantization=how, task=Task.SEQ2SEQ
        )
        loaded = plain.model if name is None else PeftModel.from_pretrained(plain.model, str(paths[name])).eval()
        likely = peft_logprobs(loaded, prompt, answer.tokens)
        # On some CPUs bitsandbytes' kernel computes in bfloat16, whatever it is given.
        assert [each.logprob for each in answer.logprobs] == pytest.approx(likely, abs=1e-3 if how == "int8" else 0.1)
        if how == "int8":
            assert answer.tokens == peft_generated(loaded, prompt, TOKENS)
        dense = peft_logprobs(peft_loaded(model, paths[name] if name else None), prompt, answer.tokens)
        assert likely != pytest.approx(dense, abs=1e-4), "nothing was quantized"
