"""Decode steps that are replayed answer what PEFT does, whoever joins and leaves, and are never captured again.

On a CPU a replay calls the step again, on the same buffers, and the kernels' reference stands in for them: what is
tested is all but the kernels and CUDA's capture, which tests/gpu runs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest

from service.engine.engine import BatchEngine
from service.engine.graphs.decode import DecodeGraphs
from service.engine.sequence import GenerationRequest, SamplingParams
from tests.factories import AdapterSpec
from tests.graphs import Guarded, graphs_of, interpreted, options, places
from tests.lora_factory import make_lora
from tests.parity.test_engine_parity import (
    ARCHS,
    SELECTIONS,
    SPECS,
    Answer,
    Bench,
    ask,
    check_greedy,
    make_bench,
    random_load,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
KERNELS = ["bank-direct", "gathered"]
TOO_SHORT = "c"  # its vectors of 8 fit no table of 16
SAVED: dict[str, float] = {"saved": 1.0}


@pytest.fixture(scope="module", params=ARCHS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """With an adapter that saves a module and a LoRA, beside those of several ranks and lengths of vectors."""
    specs = {**SPECS, "saved": AdapterSpec(seed=6, modules_to_save=["lm_head"])}
    bench = make_bench(request.param, tmp_path_factory.mktemp(request.param), specs)
    bench.adapters["plain"] = make_lora(bench.model, bench.folder / "plain", target_modules="all-linear", lora_alpha=3)
    return bench


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_flood_is_never_captured_again(bench: Bench, kernels: str) -> None:
    """The base, adapters alone and blends; some are folded in, which graphs see where nothing has moved."""
    left_out = {TOO_SHORT, "plain"} if kernels == "bank-direct" else set()
    fitting = [selection for selection in SELECTIONS if not selection.keys() & left_out]
    backend = Guarded()
    with bench.engine(max_batch_size=5, prefill_tokens=32, graph_backend=backend, graphs=options(kernels)) as engine:
        graphs = made(engine)
        warmed_up, before = backend.captures, places(engine)
        assert warmed_up == len(graphs.buckets.all()) == 4 * 3, "1, 2, 4 and 6 rows; 64, 128 and 256 columns"
        requests = random_load(bench, 40, seed=ARCHS.index(bench.arch), among=fitting)
        answers = ask(engine, requests)
        check_greedy(bench, requests, answers)
        again = ask(engine, in_other_order(requests))
        assert backend.captures == warmed_up
        assert places(engine) == before
        assert graphs.replayed > 100
        assert engine.stats().replayed_steps == graphs.replayed
        assert set(graphs.eager) <= {"rows"}, "the last token of a prompt, run alone"
        assert graphs.eager["rows"] <= 2 * sum(request.n for request in requests)
    check_seeded(bench, requests, answers, again)


@pytest.mark.parametrize("kernels", KERNELS)
def test_steps_that_do_not_fit_run_eagerly(bench: Bench, kernels: str) -> None:
    """Selections that no table holds come and go among the others."""
    with bench.engine(
        max_batch_size=3, prefill_tokens=32, graph_backend=Guarded(), graphs=options(kernels, most=6)
    ) as engine:
        graphs = made(engine)
        captured = graphs.captures
        requests = random_load(bench, 30, seed=7)
        check_greedy(bench, requests, ask(engine, requests))
        saved = [one_of(bench, f"saved {i}", SAVED if i % 2 else {"a": 1.0}) for i in range(6)]
        answers = ask(engine, saved)
        assert graphs.captures == captured
        assert graphs.replayed
        assert set(graphs.eager) - {"rows"} == {"adapter"}
        assert engine.stats().eager_steps == sum(graphs.eager.values())
    with bench.engine(max_batch_size=1) as engine:
        assert {name: each.tokens for name, each in ask(engine, saved).items()} == {
            name: each.tokens for name, each in answers.items()
        }


@pytest.mark.parametrize("kernels", KERNELS)
def test_triton_itself(bench: Bench, kernels: str) -> None:
    """The very kernels, interpreted: two rows at a time, a blend and two adapters."""
    pytest.importorskip("triton", reason="Triton is not installed (the extra `kernels`, on Linux)")
    asked = [{"a": 1.0}, {"a": 0.6, "b": 0.4}, {}, {"b": 1.0}]
    with bench.engine(max_batch_size=1, graph_backend=interpreted(), graphs=options(kernels, most=1)) as engine:
        graphs = made(engine)
        requests = [one_of(bench, f"{i}", weights, tokens=3) for i, weights in enumerate(asked)]
        answers = ask(engine, requests)
        assert graphs.replayed >= 4
        assert set(graphs.eager) <= {"rows"}
    for request, weights in zip(requests, asked, strict=True):
        assert answers[request.request_id].tokens[0] == bench.expected(weights, request.prompt_ids)[:3]


def made(engine: BatchEngine) -> DecodeGraphs:
    graphs = graphs_of(engine)
    assert graphs is not None
    return graphs


def one_of(bench: Bench, name: str, weights: Mapping[str, float], tokens: int = 8) -> GenerationRequest:
    params = SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
    return GenerationRequest(name, tuple(name.encode()), params, bench.selection(weights))


def in_other_order(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    return random.Random(0).sample(requests, len(requests))


def check_seeded(bench: Bench, requests: Sequence[GenerationRequest], *answers: Mapping[str, Answer]) -> None:
    """What is drawn by chance is what the eager engine draws."""
    with bench.engine(max_batch_size=2, prefix_cache=False) as engine:
        assert graphs_of(engine) is None, "not on a CPU"
        seeded = [request for request in requests if not request.params.greedy]
        expected = ask(engine, seeded)
    assert len(seeded) > 5
    for request in seeded:
        for answer in answers:
            assert answer[request.request_id].tokens == expected[request.request_id].tokens
