"""A model in two processes answers what it answers in one: tokens, log-probabilities, and what PEFT says."""

from __future__ import annotations

import os
import queue
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from service.engine.engine import BatchEngine
from service.engine.errors import EngineUnavailable
from service.engine.events import Event, FailedEvent, FinishedEvent, PromptEvent, TokenEvent, TokenLogprob
from service.engine.seam import EngineState
from service.engine.selection import Mode
from service.engine.sequence import GenerationRequest, SamplingParams
from service.engine.shards.team import Team
from tests.factories import AdapterSpec, Arch
from tests.lora_factory import make_lora
from tests.parity.test_engine_parity import TOKENS, Bench, make_bench

ARCHS: list[Arch] = ["llama", "qwen2", "qwen3", "gemma2"]
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
SPECS = {
    "all": AdapterSpec(seed=1, target_modules=EVERYWHERE),
    "long": AdapterSpec(seed=2, target_modules="all-linear", vector_length=32, compact=False, topk=3, r=2),
    "some": AdapterSpec(seed=3, target_modules=["o_proj", "up_proj"], vector_length=4, r=5),
    "saved": AdapterSpec(seed=4, target_modules=["q_proj"], modules_to_save=["lm_head", "o_proj", "down_proj"]),
    "norms": AdapterSpec(seed=5, target_modules=["v_proj", "down_proj"], modules_to_save=["embed_tokens", "norm"]),
}
BIASED = {"biased": AdapterSpec(seed=6, target_modules=["q_proj", "o_proj"], bias="all")}
SELECTIONS: list[dict[str, float]] = [
    {}, {"all": 1.0}, {"long": 1.0}, {"some": 1.0}, {"saved": 1.0}, {"norms": 1.0}, {"biased": 1.0}, {"plain": 1.0},
    {"all": 0.5, "long": 0.5}, {"some": -0.4, "plain": 0.8}, {"saved": 0.5, "biased": 0.7}, {"all": 0.3, "norms": 0.3},
]  # fmt: skip
PEFT_TELLS = ("all", "long", "some", "plain")  # of which PEFT's deltas say everything
BIASES: dict[str, dict[str, bool]] = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}}
WAIT_S = 60


@dataclass
class Answer:
    """What one choice was told, and the request's prompt."""

    tokens: list[int]
    logprobs: list[TokenLogprob]
    prompt: Sequence[TokenLogprob | None] = ()


def answers_of(engine: BatchEngine, requests: Sequence[GenerationRequest]) -> dict[str, Answer]:
    """All at once; every one finishes."""
    events: queue.Queue[Event] = queue.Queue()
    for request in requests:
        engine.submit([request], events.put)
    answers = {request.request_id: Answer([], []) for request in requests}
    ended = 0
    while ended < len(requests):
        event = events.get(timeout=WAIT_S)
        answer = answers[event.request_id]
        match event:
            case TokenEvent():
                answer.tokens += event.token_ids
                answer.logprobs += event.logprobs
            case PromptEvent():
                answer.prompt = event.logprobs
            case _:
                assert isinstance(event, FinishedEvent), event
                ended += 1
    return answers


@contextmanager
def team_of(bench: Bench, size: int = 2, **options: Any) -> Iterator[Team]:
    team = Team(str(bench.folder / "base"), size, dtype="auto", device="cpu", pack_weights=True, threads=1, **options)
    try:
        yield team
    finally:
        team.close()
        assert not any(is_alive(pid) for pid in team.processes)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module", params=ARCHS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    # Four heads of 16 over two of keys and values, in features that a part of 24 or 72 cuts in the midst of tiles.
    sizes = {"intermediate_size": 96, "tie_word_embeddings": request.param == "qwen3"}
    specs = SPECS | (BIASED if request.param in BIASES else {})
    bench = make_bench(
        request.param, tmp_path_factory.mktemp(request.param), specs, **sizes, **BIASES.get(request.param, {})
    )
    lora = {"target_modules": "all-linear", "lora_alpha": 3, "use_rslora": True}
    bench.adapters["plain"] = make_lora(bench.model, bench.folder / "plain", **lora)
    return bench


def requests_of(bench: Bench) -> list[GenerationRequest]:
    """Every selection greedy and seeded, after long prompts and short; some begin alike, some score their prompt."""
    pick = random.Random(0)
    shared = pick.choices(range(256), k=48)
    greedy = SamplingParams(max_new_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=3)
    seeded = replace(greedy, temperature=0.9, top_p=0.95)
    requests = []
    for i, weights in enumerate(SELECTIONS):
        if not weights.keys() <= bench.adapters.keys():
            continue
        selection = bench.selection(weights)
        own = tuple(pick.choices(range(256), k=pick.choice([1, 3, 20, 70])))
        more = ("alike", (*shared, *own[:9]), greedy), ("scored", own[:20], replace(greedy, prompt_logprobs=2))
        for what, prompt, params in (
            ("greedy", own, greedy),
            ("seeded", (*shared, *own[:5]), replace(seeded, seed=100 + i)),
            more[i % 2],
        ):
            requests.append(GenerationRequest(f"{what} {i}", prompt, params, selection))
    return requests


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_processes_answer_as_one(bench: Bench) -> None:
    options: dict[str, Any] = {"max_batch_size": 5, "prefill_tokens": 32, "max_queue": 200}
    with bench.engine(**options) as engine:
        requests = requests_of(bench)
        expected = answers_of(engine, requests)
        backend = engine.kv_backend
    with team_of(bench) as team, bench.engine(team=team, **options) as engine:
        assert engine.kv_backend == backend
        answers = answers_of(engine, requests)
        again = answers_of(engine, requests[::-1])
        assert engine.stats().prefix_tokens > 0
    assert len({tuple(answer.tokens) for answer in answers.values()}) > len(SELECTIONS), "adapters change the text"
    for request in requests:
        name = request.request_id
        assert answers[name].tokens == again[name].tokens == expected[name].tokens, name
        check_close(answers[name].logprobs, expected[name].logprobs)
        check_close(answers[name].prompt, expected[name].prompt)
        weights = {n: a.weight for n in bench.digests for a in request.selection.adapters if a.name == n}
        is_tied = bench.model.config.tie_word_embeddings  # then a delta of lm_head, added to it, changes embeddings too
        if name.startswith("greedy") and weights.keys() <= set(PEFT_TELLS) and not is_tied:
            assert answers[name].tokens == bench.expected(weights, request.prompt_ids), name


def check_close(ours: Sequence[TokenLogprob | None], theirs: Sequence[TokenLogprob | None]) -> None:
    """Within what float32 rounds: the sums over two parts are added in another order."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-3)


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench("llama", tmp_path_factory.mktemp("small"), {"all": SPECS["all"]}, max_position_embeddings=2048)


def endless(bench: Bench, name: str, mode: Mode = Mode.SWITCH) -> GenerationRequest:
    params = SamplingParams(max_new_tokens=1900, temperature=0.0, ignore_eos=True)
    return GenerationRequest(name, tuple(b"go on"), params, bench.selection({"all": 1.0}, mode))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_lost_ends_the_engine_and_every_request(small: Bench, how: signal.Signals) -> None:
    """Also one that only stands still: the others wait for no longer than they were told to."""
    with team_of(small, timeout_s=2.0) as team, small.engine(team=team, max_batch_size=2) as engine:
        team.on_lost(engine.die)
        events: queue.Queue[Event] = queue.Queue()
        engine.submit([endless(small, "one"), endless(small, "two"), endless(small, "waits")], events.put)
        assert isinstance(events.get(timeout=WAIT_S), TokenEvent)
        os.kill(team.processes[0], how)
        ends: dict[str, FailedEvent] = {}
        while len(ends) < 3:
            event = events.get(timeout=WAIT_S)
            if not isinstance(event, TokenEvent):
                assert isinstance(event, FailedEvent)
                assert event.request_id not in ends
                ends[event.request_id] = event
        assert {event.code for event in ends.values()} == {"internal_error"}
        assert engine.state is EngineState.DEAD
        with pytest.raises(EngineUnavailable):
            engine.submit([endless(small, "late")], events.put)


def test_a_process_that_is_lost_while_nothing_runs(small: Bench) -> None:
    with team_of(small) as team, small.engine(team=team) as engine:
        dead: queue.Queue[Exception] = queue.Queue()

        def die(error: Exception) -> None:
            engine.die(error)
            dead.put(error)

        team.on_lost(die)
        os.kill(team.processes[0], signal.SIGKILL)
        assert "has ended" in str(dead.get(timeout=WAIT_S))
        engine._thread.join(WAIT_S)
        assert engine.state is EngineState.DEAD


def test_nothing_is_folded(small: Bench) -> None:
    """A request that would rather be merged runs beside the weights."""
    with team_of(small) as team, small.engine(team=team) as engine:
        asked = replace(
            endless(small, "merge", Mode.MERGE), params=SamplingParams(TOKENS, temperature=0.0, ignore_eos=True)
        )
        answer = answers_of(engine, [asked])["merge"]
        assert answer.tokens == small.expected({"all": 1.0}, asked.prompt_ids)
        assert engine.stats().folds == 0
        with pytest.raises(Exception, match="held in parts"):
            engine.fold(asked.selection).result(WAIT_S)
