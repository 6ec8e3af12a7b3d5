from __future__ import annotations

from service.engine.scheduler import Scheduler, foldable
from service.engine.selection import Mode, SelectedAdapter, Selection
from service.engine.sequence import GenerationRequest, SamplingParams, Sequence, SequenceStatus


def sequence(name: str, selection: Selection | None = None) -> Sequence:
    return Sequence(GenerationRequest(name, (1,), SamplingParams(), selection or Selection()), 0)


def selecting(name: str, mode: Mode = Mode.SWITCH, weight: float = 1.0) -> Sequence:
    return sequence(name, Selection((SelectedAdapter(name, f"sha256:{name}", weight),), mode))


def test_admits_in_order_of_arrival_up_to_the_batch_size() -> None:
    scheduler = Scheduler(max_batch_size=2)
    first, second, third = (sequence(name) for name in "abc")
    scheduler.add([first, second, third])
    assert scheduler.admit() == [first, second]
    assert scheduler.admit() == []
    assert scheduler.waiting == 1
    second.status = SequenceStatus.FINISHED
    assert scheduler.remove_finished() == [0]
    assert scheduler.admit() == [third]
    assert scheduler.running == [first, third]


def test_a_sequence_that_ends_while_waiting_never_runs() -> None:
    scheduler = Scheduler(max_batch_size=1)
    running, cancelled, last = (sequence(name) for name in "abc")
    scheduler.add([running, cancelled, last])
    scheduler.admit()
    cancelled.status = SequenceStatus.FINISHED
    assert scheduler.remove_finished() is None, "no running row left"
    running.status = SequenceStatus.FINISHED
    assert scheduler.remove_finished() == []
    assert scheduler.admit() == [last]


def test_has_work_while_anything_waits_or_runs() -> None:
    scheduler = Scheduler(max_batch_size=1)
    assert not scheduler.has_work
    only = sequence("a")
    scheduler.add([only])
    assert scheduler.has_work
    scheduler.admit()
    assert scheduler.has_work
    only.status = SequenceStatus.FINISHED
    scheduler.remove_finished()
    assert not scheduler.has_work


def test_foldable_only_when_every_row_asked_to_merge_the_same_selection() -> None:
    merged = selecting("sql", Mode.MERGE)
    assert foldable([merged, selecting("sql", Mode.MERGE)]) == merged.selection
    assert foldable([merged, selecting("sql", Mode.SWITCH)]) is None
    assert foldable([merged, selecting("style", Mode.MERGE)]) is None
    assert foldable([merged, selecting("sql", Mode.MERGE, weight=0.5)]) is None
    assert foldable([merged, sequence("base")]) is None
    assert foldable([selecting("sql")]) is None
    assert foldable([sequence("base", Selection((), Mode.MERGE))]) is None, "the base is never folded"
    assert foldable([]) is None
