"""The engine under a random load, on a real model with real adapters: every answer is what PEFT says it must be.

Memory is short and the batch small, so that rows wait, slots grow and move, and prefixes are reused and evicted.
"""

from __future__ import annotations

import copy
import queue
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.vblora import VBLoRALayer
from transformers import PreTrainedModel

from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from service.engine.base_model import load_base
from service.engine.build import EngineOptions, build_engine
from service.engine.engine import BatchEngine
from service.engine.events import Event, FailedEvent, FinishedEvent, TokenEvent
from service.engine.graphs.capture import GraphBackend
from service.engine.selection import Mode, SelectedAdapter, Selection
from service.engine.sequence import GenerationRequest, SamplingParams
from service.engine.shards.team import Team
from tests.factories import AdapterSpec, Arch, make_adapter, peft_greedy, peft_reference, save_model, tiny_model
from tests.lora_factory import make_lora

ARCHS: list[Arch] = ["llama", "qwen2", "gpt2"]
TOKENS = 10
KV_BYTES = {"llama": 512, "qwen2": 512, "gpt2": 1024}  # of one token, in two layers
SPECS = {
    "a": AdapterSpec(seed=1),
    "b": AdapterSpec(seed=2, target_modules="all-linear", r=2),
    "c": AdapterSpec(seed=3, compact=False, topk=3, vector_length=8),
    "versioned": AdapterSpec(seed=4),
    "versioned, later": AdapterSpec(seed=5, r=3),
}
SELECTIONS: list[dict[str, float]] = [
    {},
    {"a": 1.0},
    {"b": 1.0},
    {"c": 1.0},
    {"versioned": 1.0},
    {"versioned, later": 1.0},
    {"a": 0.5},
    {"a": 0.6, "b": 0.4},
    {"b": -0.5, "c": 1.2},
    {"a": 0.3, "b": 0.3, "versioned": -0.3},
    {"plain": 1.0},
    {"plain": 0.6, "a": 0.5},
]


@dataclass
class Answer:
    """What one request was told: the tokens of each choice."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    end: FinishedEvent | FailedEvent | None = None


@dataclass
class Bench:
    """A model and its adapters on disk, and engines over them."""

    arch: Arch
    folder: Path
    model: PreTrainedModel
    adapters: dict[str, Path]
    digests: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def engine(
        self, dtype: str = "auto", graph_backend: GraphBackend | None = None, team: Team | None = None, **options: Any
    ) -> Iterator[BatchEngine]:
        """With a `team` of this process and others, over the model in parts; the caller's to close."""
        with ExitStack() as opened:
            shard = None if team is None else team.shard
            base = load_base(str(self.folder / "base"), dtype=dtype, device="cpu", shard=shard)
            if team is not None:
                team.join(base.device)
            store = AdapterStore(self.folder / f"data-{len(list(self.folder.iterdir()))}")
            opened.callback(store.close)
            registry = AdapterRegistry(
                store, base.adapted, base.identity, factor_budget=200_000, device=torch.device("cpu")
            )
            for name, path in self.adapters.items():
                with store.staging() as staged:
                    shutil.copytree(path, staged, dirs_exist_ok=True)
                    record = registry.register("", name.partition(",")[0], staged, replace=True)
                self.digests[name] = record.digest
            engine = build_engine(base, registry, EngineOptions(**options), graph_backend=graph_backend, team=team)
            opened.callback(engine.stop)
            yield engine.start()
            engine.stop()
            assert all(registry.status(digest).pins == 0 for digest in self.digests.values())

    def selection(self, weights: Mapping[str, float], mode: Mode = Mode.SWITCH) -> Selection:
        return Selection(tuple(SelectedAdapter(n, self.digests[n], w) for n, w in weights.items()), mode)

    @cache  # noqa: B019
    def reference(self, *weights: tuple[str, float]) -> PreTrainedModel:
        """The base with PEFT's own dense deltas added to its weights, in float32."""
        model = copy.deepcopy(self.model)
        for name, weight in weights:
            adapted = peft_reference(self.model, self.adapters[name]).base_model.model
            for module_name, module in adapted.named_modules():
                if isinstance(module, (VBLoRALayer, LoraLayer)):
                    with torch.no_grad():
                        model.get_submodule(module_name).weight += weight * module.get_delta_weight("default")
        return model

    def expected(self, weights: Mapping[str, float], prompt: Sequence[int]) -> list[int]:
        return peft_greedy(self.reference(*weights.items()), list(prompt), TOKENS)

    __hash__ = object.__hash__


@pytest.fixture(scope="module", params=ARCHS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = make_bench(request.param, tmp_path_factory.mktemp(request.param), SPECS)
    ranks = {"layers.1.self_attn.v_proj": 7, "h.1.attn.c_attn": 7}
    lora = {"target_modules": "all-linear", "lora_alpha": 3, "use_rslora": True, "rank_pattern": ranks}
    bench.adapters["plain"] = make_lora(bench.model, bench.folder / "plain", **lora)
    return bench


def make_bench(arch: Arch, folder: Path, specs: Mapping[str, AdapterSpec], **overrides: Any) -> Bench:
    model = tiny_model(arch, **overrides)
    save_model(model, folder / "base")
    return Bench(arch, folder, model, {name: make_adapter(model, spec, folder / name) for name, spec in specs.items()})


def ask(engine: BatchEngine, requests: Sequence[GenerationRequest]) -> dict[str, Answer]:
    """Submits all at once and waits for every end."""
    events: queue.Queue[Event] = queue.Queue()
    for request in requests:
        engine.submit([request], events.put)
    answers = {request.request_id: Answer() for request in requests}
    while any(answer.end is None for answer in answers.values()):
        event = events.get(timeout=60)
        answer = answers[event.request_id]
        assert answer.end is None, "nothing after the end"
        if isinstance(event, TokenEvent):
            answer.tokens.setdefault(event.choice, []).extend(event.token_ids)
        else:
            answer.end = event
    return answers


def random_load(
    bench: Bench, count: int, seed: int, among: Sequence[dict[str, float]] = SELECTIONS
) -> list[GenerationRequest]:
    """Some prompts begin alike, some are one token long; some requests are greedy, some seeded, some want to merge."""
    pick = random.Random(seed)
    shared = [pick.choices(range(256), k=100) for _ in range(2)]
    requests = []
    for i in range(count):
        length = pick.choice([1, 2, pick.randint(3, 40), pick.randint(41, 120)])
        prompt = [*pick.choice([[], *shared])[: length // 2], *pick.choices(range(256), k=length)][-length:]
        if pick.random() < 0.4:
            prompt = [*pick.choice(shared)[: pick.randint(16, 100)], *pick.choices(range(256), k=5)]
        params = SamplingParams(max_new_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        if pick.random() < 0.4:
            params = replace(params, temperature=pick.choice([0.7, 1.3]), top_p=0.95, seed=pick.randrange(2**40))
        mode = pick.choice([Mode.SWITCH, Mode.SWITCH, Mode.MERGE])
        selection = bench.selection(pick.choice(among), mode)
        requests.append(GenerationRequest(f"{i}", tuple(prompt), params, selection, n=pick.choice([1, 1, 1, 3])))
    return requests


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_random_load(bench: Bench) -> None:
    short = 3 * 193 * KV_BYTES[bench.arch]
    with bench.engine(max_batch_size=4, prefill_tokens=16, kv_memory=short, max_queue=100) as engine:
        requests = random_load(bench, 40, seed=ARCHS.index(bench.arch))
        answers = ask(engine, requests)
        check_greedy(bench, requests, answers)
        longest = max(requests, key=lambda request: len(request.prompt_ids))
        for turn in range(2):  # alone: what the load itself has left of prefixes is a matter of timing
            ask(engine, [replace(longest, request_id=f"again-{turn}")])
        stats = engine.stats()
        assert stats.prefix_tokens > 0
        assert 0 < stats.prefix_bytes <= short
        again = ask(engine, requests[::-1])  # other neighbours, other prefixes at hand
    with bench.engine(max_batch_size=1, prefix_cache=False) as engine:
        seeded = [request for request in requests if not request.params.greedy]
        alone: dict[str, Answer] = {}
        for request in seeded:
            alone |= ask(engine, [request])
    assert len(seeded) > 5
    for request in seeded:
        tokens = alone[request.request_id].tokens
        assert answers[request.request_id].tokens == again[request.request_id].tokens == tokens
        assert len(tokens) == len({tuple(choice) for choice in tokens.values()}) == request.n, "choices differ"


def check_greedy(bench: Bench, requests: Sequence[GenerationRequest], answers: Mapping[str, Answer]) -> None:
    names = {digest: name for name, digest in bench.digests.items()}
    different = set()
    for request in requests:
        answer = answers[request.request_id]
        assert isinstance(answer.end, FinishedEvent)
        assert answer.end.usage.completion_tokens == TOKENS * request.n
        if request.params.greedy:
            weights = {names[adapter.digest]: adapter.weight for adapter in request.selection.adapters}
            expected = bench.expected(weights, request.prompt_ids)
            assert answer.tokens == dict.fromkeys(range(request.n), expected), (weights, request)
            different.add(tuple(expected))
    assert len(different) > 8


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merged_and_restored_under_way(bench: Bench) -> None:
    """One selection alone is folded; when others join it goes on beside them, and everyone's text is as ever."""
    prompt = tuple(b"merge me")
    greedy = SamplingParams(max_new_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    with bench.engine(max_batch_size=4) as engine:
        for weights in ({"a": 1.0}, {"b": -0.5, "c": 1.2}, {"plain": 0.6, "a": 0.5}):
            merged = GenerationRequest("merged", prompt, greedy, bench.selection(weights, Mode.MERGE), n=2)
            answer = ask(engine, [merged])["merged"]
            assert isinstance(answer.end, FinishedEvent)
            assert answer.end.mode == "merge"
            assert answer.tokens == {choice: bench.expected(weights, prompt) for choice in range(2)}
            others = [
                GenerationRequest(f"{i}", prompt, greedy, bench.selection(other)) for i, other in enumerate(SELECTIONS)
            ]
            answers = ask(engine, [merged, *others])
            assert [answers[f"{i}"].tokens[0] for i in range(len(others))] == [
                bench.expected(other, prompt) for other in SELECTIONS
            ]
            assert answers["merged"].tokens[1] == bench.expected(weights, prompt)
        assert engine.stats().folds >= 2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_auto_merge_changes_no_text(bench: Bench) -> None:
    prompts = [bytes([65 + i]) * (i + 1) for i in range(6)]
    params = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)

    def tokens(**options: Any) -> tuple[list[list[int]], int]:
        with bench.engine(max_batch_size=2, **options) as engine:
            answers = ask(
                engine,
                [
                    GenerationRequest(f"{i}", tuple(p), params, bench.selection({"a": 1.0}))
                    for i, p in enumerate(prompts)
                ],
            )
            return [answers[f"{i}"].tokens[0] for i in range(len(prompts))], engine.stats().folds

    folded, folds = tokens(auto_merge=True)
    plain, none = tokens()
    assert folded == plain
    assert folds >= 1
    assert none == 0


# --- a shared prefix, and a flood -----------------------------------------------------------------


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench("llama", tmp_path_factory.mktemp("long"), {"a": SPECS["a"]}, max_position_embeddings=2048)


def test_64_requests_that_share_a_thousand_tokens_run_them_once(long: Bench) -> None:
    pick = random.Random(0)
    prefix = pick.choices(range(256), k=1000)
    tails = [pick.choices(range(256), k=pick.randint(1, 12)) for _ in range(64)]
    params = SamplingParams(max_new_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    with long.engine() as engine:
        selection = long.selection({"a": 1.0})
        answers = ask(
            engine,
            [GenerationRequest(f"{i}", (*prefix, *tail), params, selection) for i, tail in enumerate(tails)],
        )
        stats = engine.stats()
    assert stats.prefix_tokens >= 63 * 992, "62 blocks of 16"
    assert stats.prompt_tokens == 1000 * 64 + sum(map(len, tails)) - stats.prefix_tokens
    assert stats.prompt_tokens <= 1000 + sum(len(tail) + 8 for tail in tails)
    for i in range(0, 64, 21):
        assert answers[f"{i}"].tokens[0] == long.expected({"a": 1.0}, [*prefix, *tails[i]])


def test_a_lone_request_does_not_wait_for_a_flood(long: Bench) -> None:
    """Counted in forwards, from the moment the worker has it to its first token."""
    params = SamplingParams(max_new_tokens=60, temperature=0.0, ignore_eos=True)
    with long.engine(max_batch_size=8, max_queue=600) as engine:
        clock = Clock(engine)
        started: queue.Queue[Event] = queue.Queue()
        for i in range(500):
            prompt = tuple(random.Random(i).choices(range(256), k=30))
            engine.submit([GenerationRequest(f"{i}", prompt, params, long.selection({"a": 1.0}))], started.put)
        for _ in range(20):  # the flood runs
            assert isinstance(started.get(timeout=60), TokenEvent)
        assert engine.stats().waiting > 400
        lone = GenerationRequest("lone", tuple(b"hello"), params, long.selection({}))
        first: queue.Queue[tuple[Event, int]] = queue.Queue()
        engine.submit([lone], lambda event: first.put((event, clock.forwards)))
        event, forwards = first.get(timeout=60)
        assert isinstance(event, TokenEvent)
        assert forwards - clock.admitted_at("lone") <= 2
        assert engine.stats().waiting > 400, "the flood was there all the time"


class Clock:
    """Counts an engine's forwards, and notes when each request reached the worker."""

    def __init__(self, engine: BatchEngine) -> None:
        worker = engine._worker
        self.forwards = 0
        self._admitted: dict[str, int] = {}
        extend, admit = worker._runner.extend, worker.admit

        def counting(*arguments: Any, **options: Any) -> Any:
            self.forwards += 1
            return extend(*arguments, **options)

        def noting(job: Any) -> None:
            self._admitted[job.request.request_id] = self.forwards
            admit(job)

        patched: dict[str, Callable[..., Any]] = {"extend": counting}
        worker._runner.__dict__.update(patched)
        worker.__dict__["admit"] = noting

    def admitted_at(self, request_id: str) -> int:
        return self._admitted[request_id]
