from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from service.engine.scheduler import Limits, Scheduler, foldable
from service.engine.selection import Mode, SelectedAdapter, Selection
from service.engine.sequence import GenerationRequest, RowLength, SamplingParams, Sequence, SequenceStatus


def sequence(
    name: str, selection: Selection | None = None, prompt: int = 1, new: int = 16, tenant: str = ""
) -> Sequence:
    params = SamplingParams(max_new_tokens=new)
    request = GenerationRequest(name, (1,) * prompt, params, selection or Selection(), tenant=tenant)
    return Sequence(request, 0)


def selecting(name: str, mode: Mode = Mode.SWITCH, weight: float = 1.0, **fields: int) -> Sequence:
    return sequence(name, Selection((SelectedAdapter(name, f"sha256:{name}", weight),), mode), **fields)


def anything(lengths: Seq[RowLength]) -> bool:
    return True


def finish(scheduler: Scheduler, sequences: Iterable[Sequence]) -> list[int] | None:
    for each in sequences:
        each.status = SequenceStatus.FINISHED
    return scheduler.remove_finished()


def test_admits_in_order_of_arrival_up_to_the_batch_size() -> None:
    scheduler = Scheduler(Limits(max_batch_size=2))
    first, second, third = (sequence(name) for name in "abc")
    scheduler.add([first, second, third])
    assert scheduler.admit(anything) == [first, second]
    assert scheduler.admit(anything) == []
    assert scheduler.waiting == 1
    assert finish(scheduler, [second]) == [0]
    assert scheduler.admit(anything) == [third]
    assert scheduler.running == [first, third]


def test_who_came_first_is_first_even_if_its_adapter_had_to_be_loaded() -> None:
    scheduler = Scheduler(Limits(max_batch_size=1))
    cold, second, third = (sequence(name) for name in "abc")
    cold.arrival, second.arrival, third.arrival = 1.0, 2.0, 3.0
    scheduler.add([second, third])
    scheduler.add([cold])
    order: list[Sequence] = []
    while scheduler.has_work:
        order += scheduler.admit(anything)
        finish(scheduler, order[-1:])
    assert order == [cold, second, third]


def test_rows_that_decode_stand_before_those_that_prefill() -> None:
    scheduler = Scheduler(Limits(max_batch_size=6))
    rows = [sequence(name) for name in "abcdef"]
    scheduler.add(rows)
    scheduler.admit(anything)
    assert scheduler.line_up() is None, "nobody decodes yet"
    for row in (1, 4, 5):
        rows[row].prefilled = 1
    order = scheduler.line_up()
    assert order is not None
    assert scheduler.running == [rows[row] for row in order]
    assert set(scheduler.running[:3]) == {rows[1], rows[4], rows[5]} == set(scheduler.decoding)
    assert sum(row != place for place, row in enumerate(order)) == 4, "two pairs change places"
    assert scheduler.line_up() is None


def test_the_last_rows_fill_the_gaps() -> None:
    scheduler = Scheduler(Limits(max_batch_size=6))
    rows = [sequence(name) for name in "abcdef"]
    scheduler.add(rows)
    scheduler.admit(anything)
    order = finish(scheduler, [rows[1], rows[2], rows[5]])
    assert order is not None
    assert [rows[row] for row in order] == scheduler.running
    assert sum(row != place for place, row in enumerate(order)) == 2, "only the gaps are filled"
    assert set(scheduler.running) == {rows[0], rows[3], rows[4]}


def test_a_sequence_that_ends_while_waiting_never_runs() -> None:
    scheduler = Scheduler(Limits(max_batch_size=1))
    running, cancelled, last = (sequence(name) for name in "abc")
    scheduler.add([running, cancelled, last])
    scheduler.admit(anything)
    assert finish(scheduler, [cancelled]) is None, "no running row left"
    assert finish(scheduler, [running]) == []
    assert scheduler.admit(anything) == [last]


def test_has_work_while_anything_waits_or_runs() -> None:
    scheduler = Scheduler(Limits(max_batch_size=1))
    assert not scheduler.has_work
    only = sequence("a")
    scheduler.add([only])
    assert scheduler.has_work
    scheduler.admit(anything)
    assert scheduler.has_work
    finish(scheduler, [only])
    assert not scheduler.has_work


def test_a_flood_takes_turns_with_others() -> None:
    scheduler = Scheduler(Limits(max_batch_size=4))
    scheduler.add(selecting("flood", prompt=10) for _ in range(50))
    scheduler.add(selecting("quiet", prompt=10) for _ in range(2))
    admitted = scheduler.admit(anything)
    assert sorted(s.request.request_id for s in admitted) == ["flood", "flood", "quiet", "quiet"]


def test_a_lone_request_joins_a_full_batch_at_once() -> None:
    scheduler = Scheduler(Limits(max_batch_size=8, reserve=1))
    scheduler.add(selecting("flood") for _ in range(500))
    assert len(scheduler.admit(anything)) == 8
    lone = selecting("lone")
    scheduler.add([lone])
    assert scheduler.admit(anything) == [lone], "in the row held in reserve"
    scheduler.add([selecting("lone")])
    assert scheduler.admit(anything) == [], "which is for selections without a row"


def test_service_is_weighed_by_tokens() -> None:
    """Two shares with endless work: one of long answers, one of short ones. In the end both got as many tokens."""
    scheduler = Scheduler(Limits(max_batch_size=1))
    tokens = {"long": 0, "short": 0}
    lengths = {"long": 40, "short": 5}
    for name in tokens:
        scheduler.add(selecting(name) for _ in range(200))
    for _ in range(120):
        for each in scheduler.admit(anything):
            name = each.request.request_id
            tokens[name] += lengths[name] + 1
            scheduler.charge(each, lengths[name])
        finish(scheduler, scheduler.running)
    assert 0.8 < tokens["long"] / tokens["short"] < 1.25


def test_an_idle_share_saves_up_no_claim() -> None:
    scheduler = Scheduler(Limits(max_batch_size=1))
    scheduler.add(selecting("busy", prompt=100) for _ in range(10))
    for _ in range(5):
        scheduler.admit(anything)
        finish(scheduler, scheduler.running)
    scheduler.add(selecting("back", prompt=100) for _ in range(10))
    order = []
    for _ in range(6):
        order += [s.request.request_id for s in scheduler.admit(anything)]
        finish(scheduler, scheduler.running)
    assert order.count("back") in (3, 4), "alternating, not catching up"


def test_tenants_do_not_share() -> None:
    scheduler = Scheduler(Limits(max_batch_size=2))
    scheduler.add(sequence("one", tenant="one") for _ in range(10))
    scheduler.add([sequence("two", tenant="two")])
    assert {s.request.tenant for s in scheduler.admit(anything)} == {"one", "two"}


def test_whole_prompts_are_not_cut_and_the_first_may_be_longer_than_a_step() -> None:
    scheduler = Scheduler(Limits(prefill_tokens=50, whole_prompts=True))
    lengths = {"long": 80, "a": 20, "b": 30, "c": 25}
    scheduler.add([sequence(name, prompt=length) for name, length in lengths.items()])
    scheduler.admit(anything)
    steps = []
    while chunks := scheduler.prefill():
        steps.append([(chunk.sequence.request.request_id, len(chunk.tokens)) for chunk in chunks])
        for chunk in chunks:
            chunk.sequence.prefilled += len(chunk.tokens)
    assert steps == [[("long", 80)], [("a", 20), ("b", 30)], [("c", 25)]]


def test_admission_reserves_memory_for_the_whole_answer_and_is_not_overtaken() -> None:
    scheduler = Scheduler(Limits(max_batch_size=8))
    long, short = sequence("long", prompt=50, new=50), sequence("short", tenant="later", prompt=1, new=1)
    scheduler.add([sequence("first", prompt=10, new=10)])

    def fits(lengths: Seq[RowLength]) -> bool:
        return len(lengths) * max(length.total for length in lengths) <= 100

    assert len(scheduler.admit(fits)) == 1
    scheduler.add([long])
    assert scheduler.admit(fits) == []
    scheduler.add([short])
    assert scheduler.admit(fits) == [], "what would fit does not overtake"
    finish(scheduler, scheduler.running)
    assert scheduler.admit(fits) == [long], "alone it fits"


def test_a_sequence_that_is_not_ready_lets_others_pass() -> None:
    scheduler = Scheduler(Limits(max_batch_size=2))
    held, other = selecting("held"), selecting("other")
    scheduler.add([held, other])
    assert scheduler.admit(anything, lambda s: s is not held) == [other]
    assert scheduler.admit(anything) == [held]


def test_prompts_run_in_chunks_within_the_budget() -> None:
    scheduler = Scheduler(Limits(max_batch_size=4, prefill_tokens=100))
    long, short = sequence("long", prompt=250), selecting("short", prompt=40)
    scheduler.add([long, short])
    scheduler.admit(anything)
    taken = []
    while any(s.is_prefilling for s in scheduler.running):
        chunks = scheduler.prefill()
        assert sum(len(chunk.tokens) for chunk in chunks) <= 100
        taken.append([(chunk.sequence.request.request_id, len(chunk.tokens)) for chunk in chunks])
        for chunk in chunks:
            chunk.sequence.prefilled += len(chunk.tokens)
    assert taken[0] == [("short", 40), ("long", 60)], "the share that was served less goes first"
    assert sum(n for step in taken for name, n in step if name == "long") == 250
    assert scheduler.decoding == scheduler.running


def test_a_prompt_is_not_cut_for_a_few_tokens_of_room() -> None:
    """A forward for so few costs as much as for many."""
    scheduler = Scheduler(Limits(max_batch_size=4, prefill_tokens=100))
    rows = [selecting("first", prompt=80), selecting("long", prompt=250), selecting("tiny", prompt=15)]
    for row, served in zip(rows, (1, 2, 3), strict=True):
        scheduler.add([row])
        scheduler.admit(anything)
        scheduler.charge(row, 1000 * served)
    assert [(c.sequence.request.request_id, len(c.tokens)) for c in scheduler.prefill()] == [("first", 80)]
    rows[0].prefilled = 80
    assert [len(c.tokens) for c in scheduler.prefill()] == [100]
    rows[1].prefilled = 170
    assert [len(c.tokens) for c in scheduler.prefill()] == [80, 15]


def test_a_model_that_cannot_be_batched_runs_one_row_with_whole_prompts() -> None:
    scheduler = Scheduler(Limits.solo())
    scheduler.add([sequence("a", prompt=30), selecting("b")])
    assert len(scheduler.admit(anything)) == 1
    assert [len(chunk.tokens) for chunk in scheduler.prefill()] == [30]


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


def test_foldable_unasked_when_every_row_runs_the_same_selection() -> None:
    rows = [selecting("sql", Mode.MERGE), selecting("sql")]
    assert foldable(rows, automatic=True) is not None
    assert foldable([*rows, selecting("style")], automatic=True) is None
    assert foldable([sequence("base")], automatic=True) is None
