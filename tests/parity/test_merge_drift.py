"""An engine that merges and switches by turns answers for the base with the same bits as one that never merged."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from service.engine.engine import BatchEngine
from service.engine.events import Event, FinishedEvent
from service.engine.selection import Mode, Selection
from service.engine.sequence import GenerationRequest, SamplingParams
from tests.factories import AdapterSpec
from tests.parity.test_engine_parity import make_bench

ROUNDS = 36
SPECS = {
    "a": AdapterSpec(seed=1, target_modules="all-linear"),
    "b": AdapterSpec(seed=2, r=2, topk=3, modules_to_save=["lm_head"]),
    "c": AdapterSpec(seed=3, bias="all"),
}
BLENDS: list[dict[str, float]] = [{"a": 1.0}, {"b": 1.0}, {"a": 0.6, "b": -0.4}, {"c": 1.0}, {"b": 0.3, "c": 0.7}]
PROMPT = tuple(b"what drifts")
PARAMS = SamplingParams(max_new_tokens=6, temperature=0.0, ignore_eos=True, logprobs=20, prompt_logprobs=20)


def ask(engine: BatchEngine, selection: Selection) -> list[Event]:
    """The log-probabilities and tokens of one request, in order; it ran as its selection says."""
    events: queue.Queue[Event] = queue.Queue()
    engine.submit([GenerationRequest("r", PROMPT, PARAMS, selection)], events.put)
    told = []
    while not isinstance(event := events.get(timeout=60), FinishedEvent):
        told.append(event)
    assert event.mode == selection.mode.value
    return told


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merging_and_switching_by_turns(dtype: str, tmp_path: Path) -> None:
    bench = make_bench("llama", tmp_path, SPECS, tie_word_embeddings=True)
    with bench.engine(dtype=dtype, prefix_cache=False) as engine:
        untouched = ask(engine, bench.selection({}))
        reference = {i: ask(engine, bench.selection(weights)) for i, weights in enumerate(BLENDS)}
        merged: dict[int, list[Event]] = {}
        for turn in range(ROUNDS):
            i = turn % len(BLENDS)
            answer = ask(engine, bench.selection(BLENDS[i], Mode.MERGE))
            assert answer == merged.setdefault(i, answer), "a merge is the same one each time"
            assert ask(engine, bench.selection({})) == untouched, f"the base after {turn + 1} merges"
            if turn % 3 == 0:
                assert ask(engine, bench.selection(BLENDS[i])) == reference[i]
        assert engine.stats().folds >= ROUNDS
        assert all(answer != untouched for answer in merged.values())
