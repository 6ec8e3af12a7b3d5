"""The running batch on one thread, over a runner without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from adapters.errors import InvalidSelection
from adapters.factors import AdapterFactors
from adapters.merge import FoldReport
from service.engine.events import Event, FailedEvent, FinishedEvent, FinishReason, TokenEvent
from service.engine.job import Job, make_job
from service.engine.scheduler import Limits
from service.engine.selection import Mode, SelectedAdapter, Selection
from service.engine.sequence import GenerationRequest, SamplingParams
from service.engine.worker import Worker
from tests.fake_runner import FakeRunner

EOS = 49


class Letters:
    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("A") + i) for i in ids)


class FakeMerger:
    """Remembers what was folded, in order; None is a restore."""

    def __init__(self) -> None:
        self.history: list[list[tuple[str, float]] | None] = []

    def fold(self, selection: Sequence[tuple[AdapterFactors, float]]) -> None:
        self.history.append([(factors.digest, weight) for factors, weight in selection])

    def rounding(self, selection: Sequence[tuple[AdapterFactors, float]]) -> FoldReport:
        return FoldReport(0.25, "layer")

    def restore(self) -> None:
        self.history.append(None)


class Bench:
    """A worker, and what its requests were told."""

    def __init__(self, max_batch_size: int = 4) -> None:
        self.runner = FakeRunner()
        self.merger = FakeMerger()
        self.worker = Worker(self.runner, self.merger, Limits(max_batch_size), frozenset({EOS}))  # type: ignore[arg-type]
        self.events: dict[str, list[Event]] = {}

    def admit(
        self,
        name: str,
        prompt: int,
        weights: dict[str, float] | None = None,
        *,
        n: int = 1,
        mode: Mode = Mode.SWITCH,
        **params: object,
    ) -> Job:
        adapters = tuple(SelectedAdapter(a, f"sha256:{a}", weight) for a, weight in (weights or {}).items())
        params = {"temperature": 0.0, "max_new_tokens": 3, **params}
        request = GenerationRequest(name, (prompt,), SamplingParams(**params), Selection(adapters, mode), n)  # type: ignore[arg-type]
        job = make_job(request, self.events.setdefault(name, []).append, Letters(), lambda job: None)
        job.factors = tuple(AdapterFactors(adapter.digest, {}) for adapter in adapters)
        self.worker.admit(job)
        return job

    def run(self, limit: int = 100) -> None:
        for _ in range(limit):
            if not self.worker.has_work:
                return
            self.worker.step()
        raise AssertionError("the worker never became idle")

    def tokens(self, name: str, choice: int = 0) -> list[int]:
        of_choice = [e for e in self.events[name] if isinstance(e, TokenEvent) and e.choice == choice]
        return [token for event in of_choice for token in event.token_ids]

    def end(self, name: str) -> FinishedEvent | FailedEvent:
        """The one terminal event, which is also the last."""
        ends = [e for e in self.events[name] if isinstance(e, (FinishedEvent, FailedEvent))]
        assert len(ends) == 1
        assert self.events[name][-1] is ends[0]
        return ends[0]


def test_each_row_runs_with_its_own_selection() -> None:
    bench = Bench()
    bench.admit("base", 1)
    bench.admit("sql", 1, {"sql": 2.0})
    bench.admit("blend", 1, {"sql": 1.0, "style": 3.0})
    bench.admit("negative", 20, {"style": -3.0})
    bench.run()
    assert bench.tokens("base") == [2, 3, 4]
    assert bench.tokens("sql") == [4, 7, 10]
    assert bench.tokens("blend") == [6, 11, 16]
    assert bench.tokens("negative") == [18, 16, 14]
    assert bench.runner.forwards == [[1] * 4] * 3


def test_rows_join_and_leave_between_steps() -> None:
    bench = Bench(max_batch_size=2)
    bench.admit("long", 1, max_new_tokens=6)
    bench.admit("short", 10, {"sql": 1.0}, max_new_tokens=2)
    bench.admit("later", 30, {"style": 2.0}, max_new_tokens=3)
    bench.run()
    assert bench.tokens("long") == [2, 3, 4, 5, 6, 7]
    assert bench.tokens("short") == [12, 14]
    assert bench.tokens("later") == [33, 36, 39]
    assert max(map(len, bench.runner.forwards)) == 2
    assert bench.runner.rows == 0


def test_why_a_choice_ends() -> None:
    bench = Bench()
    bench.admit("length", 1)
    bench.admit("eos", EOS - 2, max_new_tokens=9)
    bench.admit("ignored", EOS - 2, max_new_tokens=4, ignore_eos=True)
    bench.admit("token", 1, max_new_tokens=9, stop_token_ids=frozenset({4}))
    bench.admit("string", 1, max_new_tokens=9, stop=("DE",))
    bench.run()
    reasons = {
        name: [e.finish_reason for e in events if isinstance(e, TokenEvent) and e.finish_reason]
        for name, events in bench.events.items()
    }
    assert reasons == {
        "length": [FinishReason.LENGTH],
        "eos": [FinishReason.STOP],
        "ignored": [FinishReason.LENGTH],
        "token": [FinishReason.STOP],
        "string": [FinishReason.STOP],
    }
    assert bench.tokens("eos") == [48, 49]
    text = {name: "".join(e.text for e in events if isinstance(e, TokenEvent)) for name, events in bench.events.items()}
    assert text["eos"] == chr(ord("A") + 48), "the end token has no text"
    assert text["token"] == "CD"
    assert text["string"] == "C"


def test_n_choices_end_in_one_finished_event() -> None:
    bench = Bench()
    bench.admit("three", 1, n=3)
    bench.run()
    assert [bench.tokens("three", choice) for choice in range(3)] == [[2, 3, 4]] * 3
    end = bench.end("three")
    assert isinstance(end, FinishedEvent)
    assert end.usage.completion_tokens == 9
    assert end.usage.prompt_tokens == 1
    assert 0 <= end.timing.queue_s <= end.timing.first_token_s <= end.timing.total_s


def test_a_forward_that_raises_ends_its_requests_and_no_later_one() -> None:
    bench = Bench()
    bench.runner.failing_token = 3
    bench.admit("guilty", 1, max_new_tokens=9)
    bench.run()
    bench.admit("after", 10)
    bench.run()
    end = bench.end("guilty")
    assert isinstance(end, FailedEvent)
    assert end.code == "internal_error"
    assert isinstance(bench.end("after"), FinishedEvent)
    assert bench.runner.rows == 0


def test_a_prompt_that_raises_leaves_the_running_rows_alone() -> None:
    bench = Bench()
    bench.runner.failing_token = 40
    bench.admit("running", 1, max_new_tokens=5)
    bench.worker.step()
    bench.admit("guilty", 40)
    bench.run()
    assert isinstance(bench.end("guilty"), FailedEvent)
    assert bench.tokens("running") == [2, 3, 4, 5, 6]


def test_a_failing_choice_takes_its_waiting_siblings_along() -> None:
    bench = Bench(max_batch_size=1)
    bench.runner.failing_token = 2
    bench.admit("guilty", 1, n=2, max_new_tokens=5)
    bench.run()
    assert isinstance(bench.end("guilty"), FailedEvent)
    assert bench.runner.forwards == [[1], [1]]


def test_a_row_of_nan_fails_alone() -> None:
    bench = Bench()
    bench.runner.nan_token = 21
    bench.admit("sick", 20)
    bench.admit("well", 1)
    bench.run()
    end = bench.end("sick")
    assert isinstance(end, FailedEvent)
    assert "NaN" in end.message
    assert bench.tokens("well") == [2, 3, 4]


def test_cancelling_frees_the_row_within_one_step() -> None:
    bench = Bench(max_batch_size=1)
    job = bench.admit("cancelled", 1, max_new_tokens=50)
    bench.admit("next", 10)
    bench.worker.step()
    job.cancel()
    bench.worker.step()
    assert bench.tokens("next") == [11]
    assert isinstance(bench.end("cancelled"), FinishedEvent)
    last = [e for e in bench.events["cancelled"] if isinstance(e, TokenEvent)][-1]
    assert last.finish_reason is FinishReason.CANCELLED


@pytest.mark.parametrize("params", [{"max_new_tokens": 3}, {"max_new_tokens": 0, "prompt_logprobs": 0}])
def test_a_sink_that_raises_ends_its_own_request(params: dict[str, Any]) -> None:
    bench = Bench()
    ends: list[Event] = []

    def broken(event: Event) -> None:
        if not isinstance(event, FailedEvent):
            raise RuntimeError("no room for one more event")
        ends.append(event)

    request = GenerationRequest("broken", (1,), SamplingParams(temperature=0.0, **params), Selection())
    bench.worker.admit(make_job(request, broken, Letters(), lambda job: None))
    bench.admit("well", 1)
    bench.run()
    assert len(ends) == 1, "an answer with a hole must not look whole"
    assert bench.tokens("well") == [2, 3, 4]


def test_a_sink_that_cannot_take_even_the_end_harms_nobody() -> None:
    bench, ended = Bench(), list[Job]()

    def broken(event: Event) -> None:
        raise RuntimeError("the client is gone")

    request = GenerationRequest("broken", (1,), SamplingParams(max_new_tokens=3, temperature=0.0), Selection())
    bench.worker.admit(make_job(request, broken, Letters(), ended.append))
    bench.admit("well", 1)
    bench.run()
    assert len(ended) == 1
    assert bench.tokens("well") == [2, 3, 4]


def test_folds_while_all_rows_want_it_and_restores_when_another_joins() -> None:
    bench = Bench()
    bench.admit("merged", 1, {"sql": 2.0}, mode=Mode.MERGE, max_new_tokens=4)
    bench.worker.step()
    assert bench.merger.history == [[("sha256:sql", 2.0)]]
    assert bench.tokens("merged") == [2], "folded: no low-rank part was passed"
    bench.admit("switch", 1, {"sql": 2.0}, max_new_tokens=2)
    bench.run()
    assert bench.merger.history == [[("sha256:sql", 2.0)], None, [("sha256:sql", 2.0)]]
    assert bench.tokens("switch") == [4, 7]
    end = bench.end("merged")
    assert isinstance(end, FinishedEvent)
    assert end.mode == "switch", "not every step of it ran folded"
    assert (bench.worker.folding.folds, bench.worker.folding.restores) == (2, 1)
    assert bench.worker.folding.fold_s > 0
    assert bench.worker.folding.restore_s > 0


def test_what_cannot_be_folded_runs_beside_the_weights() -> None:
    bench = Bench()

    def refuse(selection: object) -> FoldReport:
        raise InvalidSelection("it overflows")

    bench.merger.fold = refuse  # type: ignore[method-assign]
    bench.admit("merged", 1, {"sql": 2.0}, mode=Mode.MERGE)
    bench.run()
    assert bench.tokens("merged") == [4, 7, 10]
    end = bench.end("merged")
    assert isinstance(end, FinishedEvent)
    assert end.mode == "switch"


def test_a_request_that_ran_folded_throughout_says_merge() -> None:
    bench = Bench()
    bench.admit("merged", 1, {"sql": 2.0}, mode=Mode.MERGE)
    bench.run()
    end = bench.end("merged")
    assert isinstance(end, FinishedEvent)
    assert end.mode == "merge"
    bench.admit("base", 1)
    bench.run()
    assert bench.merger.history[-1] is None, "the base runs on pristine weights"


def test_logprobs_only_where_asked() -> None:
    bench = Bench()
    bench.admit("asked", 1, logprobs=2)
    bench.admit("not", 1)
    bench.run()
    asked = [e.logprobs for e in bench.events["asked"] if isinstance(e, TokenEvent)]
    assert [len(logprobs[0].top) for logprobs in asked] == [2, 2, 2]
    assert all(not e.logprobs for e in bench.events["not"] if isinstance(e, TokenEvent))
    assert torch.isfinite(torch.tensor([logprobs[0].logprob for logprobs in asked])).all()
