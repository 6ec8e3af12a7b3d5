"""Texts that are read once, over a runner without a model: batches, fairness, failures, folding, and one end each."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from adapters.factors import AdapterFactors
from adapters.heads import ClassifierHead
from adapters.low_rank import LowRankBatch
from service.engine.events import Event, FailedEvent, FinishedEvent, FinishReason, TokenEvent
from service.engine.job import Job, make_job
from service.engine.owners import shares_of
from service.engine.pooling.runner import PooledText
from service.engine.pooling.worker import PoolingLimits, PoolingWorker
from service.engine.scheduler import Limits
from service.engine.seam import BatchShare
from service.engine.selection import Mode, SelectedAdapter, Selection
from service.engine.sequence import READ_ONCE, GenerationRequest
from service.engine.task import Task
from tests.unit.service.engine.test_worker import FakeMerger, Letters

HEAD = ClassifierHead("classifier", 2)


class FakePoolingRunner:
    """Answers each text with its length, its first token, and the sum of its weights; NaN behind a row's labels.

    `failing_token` makes a forward raise that is given it; `nan_token` makes its row NaN.
    """

    def __init__(self) -> None:
        self.ragged = True
        self.forwards: list[list[int]] = []  # the texts' lengths
        self.beside: list[LowRankBatch | None] = []
        self.failing_token: int | None = None
        self.nan_token: int | None = None
        self.error: Exception = RuntimeError("the forward failed, as it was told to")

    def run(self, texts: Sequence[PooledText], batch: LowRankBatch | None) -> Tensor:
        self.forwards.append([len(text.tokens) for text in texts])
        self.beside.append(batch)
        assert self.ragged or len(set(self.forwards[-1])) == 1
        if any(self.failing_token in text.tokens for text in texts):
            raise self.error
        rows = torch.full((len(texts), 5), torch.nan)
        for row, text in enumerate(texts):
            weight = 0.0 if batch is None else float(batch.weights[row].sum())
            rows[row, :3] = torch.tensor([len(text.tokens), text.tokens[0], weight])
            if self.nan_token in text.tokens:
                rows[row, 0] = torch.nan
        return rows


class Bench:
    """A worker, and what its requests were told."""

    def __init__(self, rows: int = 4, reserve: int = 0, tokens: int = 100, head: ClassifierHead | None = HEAD) -> None:
        self.runner = FakePoolingRunner()
        self.merger = FakeMerger()
        limits = PoolingLimits(Limits(rows, reserve), tokens)
        self.worker = PoolingWorker(self.runner, self.merger, limits, head=head)  # type: ignore[arg-type]
        self.events: dict[str, list[Event]] = {}
        self.labels: dict[str, int] = {}

    def admit(
        self,
        name: str,
        tokens: Sequence[int] = (1, 2),
        weights: dict[str, float] | None = None,
        *,
        mode: Mode = Mode.SWITCH,
        tenant: str = "",
    ) -> Job:
        adapters = tuple(SelectedAdapter(a, f"sha256:{a}", weight) for a, weight in (weights or {}).items())
        selection = Selection(adapters, mode)
        request = GenerationRequest(name, tuple(tokens), READ_ONCE, selection, tenant=tenant, task=Task.CLASSIFY)
        job = make_job(request, self.events.setdefault(name, []).append, Letters(), lambda job: None)
        job.factors = tuple(AdapterFactors(adapter.digest, {}, self.replaced(adapter.name)) for adapter in adapters)
        self.worker.admit(job)
        return job

    def replaced(self, adapter: str) -> dict[str, dict[str, Tensor]]:
        labels = self.labels.get(adapter)
        other = {"norm": {"weight": torch.ones(3)}}
        return other if labels is None else {**other, "classifier": {"weight": torch.zeros(labels, 3)}}

    def run(self, limit: int = 100) -> None:
        for _ in range(limit):
            if not self.worker.has_work:
                return
            self.worker.step()
        raise AssertionError("the worker never became idle")

    def end(self, name: str) -> FinishedEvent | FailedEvent:
        """The one terminal event, which is also the last."""
        ends = [e for e in self.events[name] if isinstance(e, (FinishedEvent, FailedEvent))]
        assert len(ends) == 1
        assert self.events[name][-1] is ends[0]
        return ends[0]

    def pooled(self, name: str) -> tuple[float, ...] | None:
        end = self.end(name)
        assert isinstance(end, FinishedEvent), end
        return end.pooled


def test_one_forward_for_all_and_each_its_own_width() -> None:
    bench = Bench()
    bench.labels = {"sql": 3, "style": 1}
    bench.admit("base", [7])
    bench.admit("sql", [8, 8, 8], {"sql": 2.0})
    bench.admit("style", [9, 9], {"style": -1.0})
    bench.admit("no-head", [5, 5], {"plain": 1.0})
    bench.run()
    assert bench.runner.forwards == [[3, 2, 2, 1]]
    assert bench.pooled("base") == (1, 7)
    assert bench.pooled("sql") == (3, 8, 2)
    assert bench.pooled("style") == (2,)
    assert bench.pooled("no-head") == (2, 5)
    assert bench.worker.prompt_tokens == 8
    for events in bench.events.values():
        assert [type(event) for event in events] == [TokenEvent, FinishedEvent]
        assert isinstance(events[0], TokenEvent)
        assert (events[0].token_ids, events[0].finish_reason) == ((), FinishReason.STOP)


def test_rows_and_padded_tokens_bound_a_forward() -> None:
    bench = Bench(rows=3, tokens=40)
    for i, length in enumerate((10, 10, 10, 10, 25, 2, 60)):
        bench.admit(f"r{i}", [1] * length)
    bench.run()
    # Three rows; then 25 would pad 10 to more than 40; then with 2 it would be 50; the one that is too long runs alone.
    assert bench.runner.forwards == [[10, 10, 10], [10], [25], [2], [60]]


def test_texts_of_very_different_lengths_run_apart() -> None:
    bench = Bench(tokens=1000)
    for i, length in enumerate((3, 80, 60, 10)):
        bench.admit(f"r{i}", [1] * length)
    bench.run()
    assert bench.runner.forwards == [[80, 60], [10, 3]]


def test_without_padding_only_equal_lengths_share_a_forward() -> None:
    bench = Bench()
    bench.runner.ragged = False
    for i, length in enumerate((3, 4, 3, 4)):
        bench.admit(f"r{i}", [1] * length)
    bench.run()
    assert bench.runner.forwards == [[4, 4], [3, 3]]


def test_a_flood_does_not_keep_others_waiting() -> None:
    bench = Bench(rows=2, reserve=1)
    for i in range(6):
        bench.admit(f"flood{i}", [1] * 5, {"sql": 1.0})
    bench.admit("lone", [2], {"style": 1.0}, tenant="other")
    bench.worker.step()
    assert bench.pooled("lone") is not None
    assert sum(any(isinstance(e, FinishedEvent) for e in events) for events in bench.events.values()) <= 3


@pytest.mark.parametrize("guilty", [0, 2, 3])
def test_only_the_guilty_text_fails(guilty: int) -> None:
    bench = Bench()
    bench.runner.failing_token = 9
    for i in range(4):
        bench.admit(f"r{i}", [9 if i == guilty else 1, 2])
    bench.run()
    for i in range(4):
        end = bench.end(f"r{i}")
        assert isinstance(end, FailedEvent if i == guilty else FinishedEvent), end
    end = bench.end(f"r{guilty}")
    assert isinstance(end, FailedEvent)
    assert end.code == "internal_error"


def test_nan_fails_its_own_row_and_nan_behind_the_labels_nobody() -> None:
    bench = Bench()
    bench.runner.nan_token = 9
    bench.admit("nan", [9, 1])
    bench.admit("well", [1, 1])
    bench.run()
    end = bench.end("nan")
    assert isinstance(end, FailedEvent)
    assert "NaN" in end.message
    assert bench.pooled("well") == (2, 1)


def test_one_that_was_cancelled_is_not_read() -> None:
    bench = Bench()
    job = bench.admit("gone")
    bench.admit("stays")
    job.cancel()
    bench.run()
    assert bench.runner.forwards == [[2]]
    assert bench.pooled("gone") is None
    assert isinstance(bench.events["gone"][0], TokenEvent)
    assert bench.events["gone"][0].finish_reason is FinishReason.CANCELLED


def test_an_error_of_the_device_leaves_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class DeviceError(RuntimeError):
        pass

    monkeypatch.setattr(torch, "AcceleratorError", DeviceError, raising=False)
    bench = Bench()
    bench.runner.failing_token, bench.runner.error = 1, DeviceError("gone")
    bench.admit("a")
    with pytest.raises(DeviceError):
        bench.worker.step()


class TestFolding:
    def test_folded_while_all_ask_for_it_and_the_head_runs_beside(self) -> None:
        bench = Bench()
        bench.labels = {"sql": 3}
        bench.admit("a", [1], {"sql": 1.0}, mode=Mode.MERGE)
        bench.admit("b", [2], {"sql": 1.0}, mode=Mode.MERGE)
        bench.run()
        assert bench.merger.history == [[("sha256:sql", 1.0)]]
        (beside,) = bench.runner.beside
        assert beside is not None
        (factors,) = beside.adapters
        assert (set(factors.replaced), dict(factors.layers)) == ({"classifier"}, {})
        end = bench.end("a")
        assert isinstance(end, FinishedEvent)
        assert (end.mode, len(end.pooled or ())) == ("merge", 3)
        bench.admit("c", [2])
        bench.run()
        assert bench.merger.history[-1] is None, "restored for the base"
        end = bench.end("c")
        assert isinstance(end, FinishedEvent)
        assert end.mode == "switch"

    def test_an_embedding_needs_nothing_beside(self) -> None:
        bench = Bench(head=None)
        bench.runner.forwards.clear()
        bench.admit("a", [1], {"sql": 1.0}, mode=Mode.MERGE)
        bench.runner.run = lambda texts, batch: torch.ones(len(texts), 2) if batch is None else torch.zeros(1, 2)  # type: ignore[method-assign]
        bench.run()
        assert bench.pooled("a") == (1, 1)

    def test_on_request(self) -> None:
        bench = Bench()
        report = bench.worker.fold(Selection((SelectedAdapter("a", "sha256:a"),)), [AdapterFactors("sha256:a", {})])
        assert report.merge_error == 0.25
        assert bench.worker.folding.folds == 1


def test_what_a_step_reads_is_told_while_it_does() -> None:
    bench = Bench(rows=2)
    assert bench.worker.max_batch_size == 2
    seen: list[tuple[BatchShare, ...]] = []
    run = bench.runner.run

    def watched(texts: Sequence[PooledText], batch: LowRankBatch | None) -> Tensor:
        seen.append(shares_of(bench.worker.running))
        return run(texts, batch)

    bench.runner.run = watched  # type: ignore[method-assign]
    for name in "abc":
        bench.admit(name, weights={"sql": 1.0}, tenant="acme")
    bench.run()
    selection = Selection((SelectedAdapter("sql", "sha256:sql"),))
    assert seen == [(BatchShare("acme", selection, rows),) for rows in (2, 1)]
    assert bench.worker.running == []
