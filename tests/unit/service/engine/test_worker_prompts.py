"""How the worker runs prompts: in chunks beside decoding rows, from the prefix cache, and in halves when one fails."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.factors import AdapterFactors
from service.engine.events import Event, FailedEvent, FinishedEvent, FinishReason, TokenEvent, Usage
from service.engine.guide import Grammar
from service.engine.job import Job, make_job
from service.engine.prefix_cache import BLOCK, PrefixCache
from service.engine.scheduler import Limits
from service.engine.selection import Mode, SelectedAdapter, Selection
from service.engine.sequence import GenerationRequest, SamplingParams
from service.engine.worker import Worker
from tests.fake_runner import TOKEN_BYTES, VOCABULARY, FakeRunner
from tests.unit.service.engine.test_worker import FakeMerger, Letters

PREFIX = [*range(10, 10 + 3 * BLOCK // 2)] * 2  # three blocks


class CheckedRunner(FakeRunner):
    """Every forward checks that its rows hold what their sequences have run: a wrong reuse shows at once."""

    worker: Worker

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], batch: Any, **options: Any) -> torch.Tensor:
        for row, of_row in zip(rows, tokens, strict=True):
            text = list(self.worker.running[row].all_ids())
            start = len(self.texts[row])
            assert self.texts[row] == text[:start]
            assert list(of_row) == text[start : start + len(of_row)]
        return super().extend(rows, tokens, batch, **options)


class Bench:
    def __init__(
        self,
        max_batch_size: int = 4,
        reserve: int = 0,
        prefill_tokens: int = 512,
        prefix_bytes: int = 1 << 20,
        scored_tokens: int = 512,
    ) -> None:
        self.runner = CheckedRunner()
        self.prefixes = PrefixCache(prefix_bytes)
        limits = Limits(max_batch_size, reserve, prefill_tokens, scored_tokens)
        self.worker = Worker(self.runner, FakeMerger(), limits, prefixes=self.prefixes)  # type: ignore[arg-type]
        self.runner.worker = self.worker
        self.events: dict[str, list[Event]] = {}

    def admit(
        self,
        name: str,
        prompt: Sequence[int],
        weights: dict[str, float] | None = None,
        *,
        n: int = 1,
        tenant: str = "",
        mode: Mode = Mode.SWITCH,
        grammar: Grammar | None = None,
        **params: Any,
    ) -> Job:
        adapters = tuple(SelectedAdapter(a, f"sha256:{a}", weight) for a, weight in (weights or {}).items())
        sampling = SamplingParams(**{"temperature": 0.0, "max_new_tokens": 3, **params})
        request = GenerationRequest(name, tuple(prompt), sampling, Selection(adapters, mode), n, tenant, None, grammar)
        job = make_job(request, self.events.setdefault(name, []).append, Letters(), lambda job: None)
        job.factors = tuple(AdapterFactors(adapter.digest, {}) for adapter in adapters)
        self.worker.admit(job)
        return job

    def run(self, limit: int = 200) -> int:
        """Steps until all is done; their number."""
        for steps in range(limit):
            if not self.worker.has_work:
                assert self.runner.rows == 0
                return steps
            self.worker.step()
        raise AssertionError("the worker never became idle")

    def tokens(self, name: str, choice: int = 0) -> list[int]:
        of_choice = [e for e in self.events[name] if isinstance(e, TokenEvent) and e.choice == choice]
        return [token for event in of_choice for token in event.token_ids]

    def end(self, name: str) -> FinishedEvent | FailedEvent:
        (end,) = [e for e in self.events[name] if not isinstance(e, TokenEvent)]
        return end

    def usage(self, name: str) -> Usage:
        end = self.end(name)
        assert isinstance(end, FinishedEvent)
        return end.usage

    @property
    def counted(self) -> tuple[int, int]:
        """Tokens of prompts that were (run, reused)."""
        return self.worker.prompt_tokens, self.worker.prefix_tokens


# --- chunks ---------------------------------------------------------------------------------------


def test_running_rows_take_a_token_every_step_while_a_long_prompt_is_run() -> None:
    bench = Bench(prefill_tokens=8)
    bench.admit("running", [1], max_new_tokens=20)
    bench.admit("beside", [5], {"sql": 1.0}, max_new_tokens=20)
    bench.worker.step()
    bench.admit("long", [3] * 50, max_new_tokens=2)
    for step in range(1, 8):
        assert bench.tokens("long") == []
        assert len(bench.tokens("running")) == len(bench.tokens("beside")) == step
        bench.worker.step()
    assert bench.tokens("long") == [4], "50 tokens in chunks of 8"
    bench.run()
    assert bench.tokens("running") == [*range(2, 22)]
    assert sum(n for of_row in bench.runner.forwards for n in of_row if n > 1) == 50 - 2 + 2


def test_prompts_of_similar_length_share_a_forward() -> None:
    bench = Bench(max_batch_size=8, prefill_tokens=1000)
    for i, length in enumerate((5, 90, 60, 200, 33, 170)):
        bench.admit(f"{i}", [3 + i] * length, max_new_tokens=1)
    bench.run()
    assert sorted(sorted(forward) for forward in bench.runner.forwards) == [[5, 33], [60, 90], [170, 200]]


def test_a_row_that_joins_takes_its_first_token_in_the_step_of_its_last_chunk() -> None:
    bench = Bench(prefill_tokens=4)
    bench.admit("prompt", [1, 2, 3, 4])
    bench.worker.step()
    assert bench.tokens("prompt") == [5]
    bench.worker.step()
    assert bench.tokens("prompt") == [5, 6]


def test_cancelled_while_its_prompt_is_run() -> None:
    bench = Bench(max_batch_size=1, prefill_tokens=8)
    job = bench.admit("long", [3] * 100)
    bench.admit("next", [1])
    bench.worker.step()
    bench.worker.step()
    job.cancel()
    bench.worker.step()
    assert bench.tokens("next") == [2], "its row is free within a step"
    (last,) = [e for e in bench.events["long"] if isinstance(e, TokenEvent)]
    assert (last.token_ids, last.finish_reason) == ((), FinishReason.CANCELLED)
    bench.run()


def test_where_rows_may_not_differ_prompts_of_different_length_run_apart() -> None:
    bench = Bench()
    bench.runner.ragged = False  # checks every forward
    for name, length in {"a": 3, "b": 7, "c": 3, "d": 9}.items():
        bench.admit(name, [5] * length)
    bench.worker.step()
    assert bench.runner.forwards == [[3, 3], [7], [9]], "but all in one step"
    bench.run()
    assert all(bench.tokens(name) == [6, 7, 8] for name in "abcd")


# --- prefixes -------------------------------------------------------------------------------------


def test_a_prompt_that_begins_alike_runs_only_its_tail() -> None:
    bench = Bench()
    bench.admit("first", [*PREFIX, 1, 2])
    bench.run()
    assert bench.counted == (50, 0)
    bench.admit("second", [*PREFIX, 7])
    bench.admit("partial", [*PREFIX[:BLOCK], 9, 9, 9])
    bench.run()
    assert bench.counted == (50 + 1 + 3, 48 + 16)
    assert bench.tokens("second") == [8, 9, 10]
    assert bench.tokens("partial") == [10, 11, 12]
    assert [bench.usage(name).cached_tokens for name in ("first", "second", "partial")] == [0, 48, 16]


def test_requests_that_come_together_wait_for_the_one_that_runs_their_prefix() -> None:
    bench = Bench(max_batch_size=8, prefill_tokens=16)
    for i in range(8):
        bench.admit(f"{i}", [*PREFIX, i])
    bench.admit("other", [3] * 5, {"sql": 1.0})
    bench.run()
    assert bench.counted == (49 + 7 + 5, 7 * 48)
    assert all(bench.tokens(f"{i}") == [i + 1, i + 2, i + 3] for i in range(8))


def test_n_choices_share_their_prompt() -> None:
    bench = Bench(max_batch_size=8)
    bench.admit("five", [*PREFIX, 1], n=5, temperature=1.0, seed=7)
    bench.run()
    assert bench.counted == (49 + 4, 4 * 48)
    assert bench.usage("five") == Usage(49, 15), "what the later choices find, the first has run"
    alone = Bench(max_batch_size=1, prefix_bytes=0)
    alone.admit("five", [*PREFIX, 1], n=5, temperature=1.0, seed=7)
    alone.run()
    assert alone.counted == (5 * 49, 0)
    assert [bench.tokens("five", i) for i in range(5)] == [alone.tokens("five", i) for i in range(5)]


def test_selections_and_tenants_share_nothing() -> None:
    bench = Bench(max_batch_size=1)
    prompt = [*PREFIX, 1]
    bench.admit("base", prompt)
    bench.admit("sql", prompt, {"sql": 1.0})
    bench.admit("half", prompt, {"sql": 0.5, "style": 0.5})
    bench.admit("other half", prompt, {"sql": 0.25, "style": 0.75})
    bench.admit("version", prompt, {"sql-v2": 1.0})
    bench.admit("merged", prompt, {"sql": 1.0}, mode=Mode.MERGE)
    bench.admit("tenant", prompt, tenant="tenant")
    bench.run()
    assert bench.counted == (7 * 49, 0)
    bench.admit("tenant again", prompt, tenant="tenant")
    bench.admit("sql again", prompt, {"sql": 1.0})
    bench.run()
    assert bench.counted == (7 * 49 + 2, 2 * 48)


def test_what_answered_nan_is_not_kept() -> None:
    bench = Bench()
    bench.runner.nan_token = 7
    bench.admit("sick", [*PREFIX, 7])
    bench.run()
    assert isinstance(bench.end("sick"), FailedEvent)
    assert bench.prefixes.nbytes == 0


def test_running_rows_take_memory_from_the_prefixes() -> None:
    bench = Bench(prefill_tokens=40)
    bench.runner.room = 100 * TOKEN_BYTES
    bench.admit("first", [*PREFIX, 1])
    bench.run()
    assert bench.prefixes.nbytes == 48 * TOKEN_BYTES
    bench.admit("large", [3] * 80, max_new_tokens=15)
    bench.worker.step()
    assert bench.prefixes.nbytes <= 5 * TOKEN_BYTES, "rows and prefixes together stay within the memory"
    bench.worker.step()
    assert bench.tokens("large") == [4], "it did not wait"
    bench.run()


def test_a_prefix_is_kept_only_in_memory_that_no_running_row_may_need() -> None:
    bench = Bench()
    bench.runner.room = 150 * TOKEN_BYTES
    bench.admit("running", [1], max_new_tokens=60)
    bench.admit("beside", [*PREFIX, 1], {"sql": 1.0})  # of 2 · 61 tokens reserved
    bench.worker.step()
    assert bench.prefixes.nbytes == BLOCK * TOKEN_BYTES, "what else it would take is promised"
    bench.run()
    assert len(bench.tokens("running")) == 60


def test_rows_that_do_not_fit_wait_for_memory() -> None:
    bench = Bench()
    bench.runner.room = 100 * TOKEN_BYTES
    for i in range(5):
        bench.admit(f"{i}", [i] * 30, max_new_tokens=10)
    bench.worker.step()
    assert bench.runner.rows == 2
    bench.run()
    assert all(len(bench.tokens(f"{i}")) == 10 for i in range(5))


@pytest.mark.parametrize("broken", ["read", "write"])
def test_prefixes_are_a_luxury(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When their memory cannot be had, prompts run as if nothing had been cached."""
    bench = Bench()
    monkeypatch.setattr(bench.runner, broken, lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    for name in ("first", "second"):
        bench.admit(name, [*PREFIX, 1])
        bench.run()
        assert bench.tokens(name) == [2, 3, 4]
    assert bench.counted == (98, 0)


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("guilty", range(8))
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_of_eight_rows_only_the_guilty_one_fails(when: str, guilty: int) -> None:
    bench = Bench(max_batch_size=8)
    bench.runner.failing_token = 49 if when == "prefill" else 6 * guilty + 1  # the first it answers
    for i in range(8):
        prompt = [49, 6 * i] if when == "prefill" and i == guilty else [6 * i]
        bench.admit(f"{i}", prompt, {f"adapter-{i}": 0.0})
    bench.run()
    for i in range(8):
        end, tokens = bench.end(f"{i}"), bench.tokens(f"{i}")
        if i == guilty:
            assert isinstance(end, FailedEvent)
            assert end.code == "internal_error"
            assert tokens == ([] if when == "prefill" else [6 * i + 1])
        else:
            assert isinstance(end, FinishedEvent)
            assert tokens == [6 * i + 1, 6 * i + 2, 6 * i + 3]
    assert sum(len(of_row) == 1 for of_row in bench.runner.forwards) <= 2, "halved, not one by one"


def test_several_guilty_ones_and_their_siblings() -> None:
    bench = Bench(max_batch_size=8)
    bench.runner.failing_token = 49
    bench.admit("one", [49], n=3)
    bench.admit("well", [1], n=2)
    bench.admit("two", [5, 49, 5])
    bench.run()
    assert isinstance(bench.end("one"), FailedEvent)
    assert isinstance(bench.end("two"), FailedEvent)
    assert [bench.tokens("well", i) for i in range(2)] == [[2, 3, 4]] * 2


def test_rows_that_cannot_be_added_fail_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.admit("running", [1], max_new_tokens=6)
    bench.worker.step()
    with monkeypatch.context() as patch:
        patch.setattr(bench.runner, "add", lambda rows: (_ for _ in ()).throw(MemoryError("no room")))
        bench.admit("unlucky", [5], n=2)
        bench.worker.step()
    assert isinstance(bench.end("unlucky"), FailedEvent)
    bench.admit("next", [10])
    bench.run()
    assert bench.tokens("running") == [2, 3, 4, 5, 6, 7]
    assert bench.tokens("next") == [11, 12, 13]


def test_a_row_that_cannot_be_sampled_fails_alone() -> None:
    bench = Bench()
    bench.admit("unlucky", [1], logit_bias=((VOCABULARY, 1.0),))
    bench.admit("well", [5], temperature=1e-9)
    bench.run()
    assert isinstance(bench.end("unlucky"), FailedEvent)
    assert bench.tokens("well") == [6, 7, 8]


def test_a_text_that_cannot_be_decoded_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setattr(Letters, "decode", lambda self, ids: "" if 2 not in ids else 1 / 0)
    bench.admit("unlucky", [1])
    bench.admit("well", [5])
    bench.run()
    assert isinstance(bench.end("unlucky"), FailedEvent)
    assert bench.tokens("well") == [6, 7, 8]


def test_infinite_token_logits_fail_like_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    answer = bench.runner._token_logits

    def overflowing(tokens: Sequence[int], batch: Any) -> torch.Tensor:
        token_logits = answer(tokens, batch)
        token_logits[[token == 1 for token in tokens]] = float("inf")
        return token_logits

    monkeypatch.setattr(bench.runner, "_token_logits", overflowing)
    bench.admit("overflowing", [1], logprobs=2)
    bench.admit("well", [5])
    bench.run()
    assert isinstance(bench.end("overflowing"), FailedEvent)
    assert bench.tokens("well") == [6, 7, 8]


def test_a_lone_request_gets_its_first_token_in_the_next_step_of_a_flood() -> None:
    bench = Bench(max_batch_size=4, reserve=1, prefill_tokens=32)
    for i in range(500):
        bench.admit(f"flood-{i}", [5] * 8, {"flood": 1.0}, max_new_tokens=50)
    for _ in range(10):
        bench.worker.step()
    before = len(bench.runner.forwards)
    bench.admit("lone", [7] * 8, {"quiet": 1.0})
    bench.worker.step()
    assert bench.tokens("lone") == [9]
    assert len(bench.runner.forwards) - before <= 2


def test_rows_that_cannot_be_moved_fail_and_later_ones_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.admit("first", [1], max_new_tokens=1)
    bench.admit("second", [5])
    keep = bench.runner.keep

    def failing(rows: Sequence[int]) -> None:
        if rows:
            raise torch.OutOfMemoryError("no memory to move rows in")
        keep(rows)

    monkeypatch.setattr(bench.runner, "keep", failing)
    bench.run()
    assert bench.tokens("first") == [2]
    assert isinstance(bench.end("second"), FailedEvent)
    monkeypatch.undo()
    bench.admit("later", [9])
    bench.run()
    assert bench.tokens("later") == [10, 11, 12]


def test_before_a_forward_is_tried_again_what_the_failed_one_held_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    extend = bench.runner.extend
    held: list[weakref.ref[Tensor]] = []

    def greedy(rows: Sequence[int], *arguments: Any, **options: Any) -> Tensor:
        assert all(activations() is None for activations in held), "the failed forward's memory is still taken"
        if len(rows) > 1:
            activations = torch.zeros(4)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("too many rows")
        return extend(rows, *arguments, **options)

    monkeypatch.setattr(bench.runner, "extend", greedy)
    for i in range(4):
        bench.admit(f"{i}", [10 * i])
    bench.run()
    assert held
    assert [bench.tokens(f"{i}") for i in range(4)] == [[10 * i + 1, 10 * i + 2, 10 * i + 3] for i in range(4)]
