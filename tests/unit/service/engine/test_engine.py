"""The engine's doors: submission, refusal, cancellation, draining, death; behind them a fake registry and runner."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import pytest

from adapters.errors import AdapterNotFound
from adapters.factors import AdapterFactors
from service.engine.detokenizer import TextStream
from service.engine.engine import BatchEngine
from service.engine.errors import ContextLengthExceeded, EngineUnavailable, InvalidRequest, Overloaded, WrongTask
from service.engine.events import Event, FailedEvent, FinishedEvent, TokenEvent
from service.engine.limits import EngineLimits
from service.engine.scheduler import Limits
from service.engine.seam import BatchShare, EngineState
from service.engine.selection import SelectedAdapter, Selection
from service.engine.sequence import GenerationRequest, SamplingParams
from service.engine.task import Task
from service.engine.worker import Worker
from tests.fake_runner import TOKEN_BYTES, VOCABULARY, FakeRunner
from tests.unit.service.engine.test_worker import FakeMerger, Letters


class GatedRunner(FakeRunner):
    """Its forwards wait until the gate is open, so that a test decides what happens meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def extend(self, rows, tokens, batch, **options):  # type: ignore[no-untyped-def]
        self.entered.set()
        assert self.gate.wait(10)
        return super().extend(rows, tokens, batch, **options)


class FakeRegistry:
    """Counts pins; `missing` digests cannot be pinned, and pinning waits while the gate is closed.

    Of those `loaded` it waits for nothing.
    """

    def __init__(self) -> None:
        self.pins: Counter[str] = Counter()
        self.missing: set[str] = set()
        self.loaded: set[str] = set()  # by digest; pinned without waiting
        self.room: int | None = None  # distinct adapters that may be pinned
        self.was_pinned, self.had_no_room = threading.Event(), threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def pin(self, digest: str) -> AdapterFactors:
        assert digest in self.loaded or self.gate.wait(10)
        if digest in self.missing:
            raise AdapterNotFound("the adapter was deleted", subject=digest)
        with self._lock:
            self.pins[digest] += 1
        self.was_pinned.set()
        return AdapterFactors(digest, {})

    def pin_loaded(self, digest: str) -> AdapterFactors | None:
        return self.pin(digest) if digest in self.loaded else None

    def unpin(self, digest: str) -> None:
        with self._lock:
            self.pins[digest] -= 1
            assert self.pins[digest] >= 0

    def has_room_for(self, digests: Collection[str]) -> bool:
        fits = self.room is None or len(set(digests) | {d for d, n in self.pins.items() if n}) <= self.room
        if not fits:
            self.had_no_room.set()
        return fits

    @property
    def pinned(self) -> int:
        return sum(self.pins.values())


class Bench:
    def __init__(self, max_queue: int = 8) -> None:
        self.runner, self.registry = GatedRunner(), FakeRegistry()
        worker = Worker(self.runner, FakeMerger(), Limits(2))  # type: ignore[arg-type]
        limits = EngineLimits(max_context=20, vocabulary=VOCABULARY, max_queue=max_queue)
        self.engine = BatchEngine(worker, self.registry, Letters(), limits)  # type: ignore[arg-type]

    def submit(self, name: str, *adapters: str, prompt: Sequence[int] = (1,), **fields: object) -> queue.Queue[Event]:
        selection = Selection(tuple(SelectedAdapter(a, f"sha256:{a}") for a in adapters))
        params = SamplingParams(max_new_tokens=int(fields.pop("max_new_tokens", 3)), temperature=0.0)  # type: ignore[call-overload]
        events: queue.Queue[Event] = queue.Queue()
        self.engine.submit([GenerationRequest(name, tuple(prompt), params, selection, **fields)], events.put)  # type: ignore[arg-type]
        return events


def finish(events: queue.Queue[Event]) -> tuple[list[int], FinishedEvent | FailedEvent]:
    """Everything up to the terminal event: the token ids, and how it ended."""
    tokens: list[int] = []
    while True:
        event = events.get(timeout=10)
        if not isinstance(event, TokenEvent):
            assert events.empty()
            return tokens, event
        tokens += event.token_ids


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.engine.start()
    yield bench
    bench.runner.gate.set()
    bench.registry.gate.set()
    bench.engine.stop()
    assert bench.registry.pinned == 0, "every pin is given back"


def test_answers_many_requests_with_different_adapters(bench: Bench) -> None:
    all_events = [bench.submit(f"{i}", *["sql"] * (i % 2), prompt=[i + 1]) for i in range(8)]
    for i, events in enumerate(all_events):
        tokens, end = finish(events)
        step = 1 + i % 2
        assert tokens == [i + 1 + step, i + 1 + 2 * step, i + 1 + 3 * step]
        assert isinstance(end, FinishedEvent)


def test_refuses_what_it_cannot_run(bench: Bench) -> None:
    with pytest.raises(InvalidRequest, match="no tokens"):
        bench.submit("empty", prompt=[])
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        bench.submit("unknown", prompt=[VOCABULARY])
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        bench.submit("negative", prompt=[-1])
    with pytest.raises(ContextLengthExceeded, match="the 18 of the prompt"):
        bench.submit("long", prompt=[1] * 18, max_new_tokens=3)
    assert finish(bench.submit("just fits", prompt=[1] * 17, max_new_tokens=3))[0] == [2, 3, 4]


def test_a_full_queue_is_refused_at_once_and_recovers(bench: Bench) -> None:
    bench.runner.gate.clear()
    first = bench.submit("first")
    assert bench.runner.entered.wait(10)
    waiting = [bench.submit(f"waiting-{i}", n=2) for i in range(4)]
    with pytest.raises(Overloaded) as refused:
        bench.submit("one too many")
    assert refused.value.retry_after_s >= 1
    assert bench.engine.stats().waiting == 8
    bench.runner.gate.set()
    for events in [first, *waiting]:
        assert isinstance(finish(events)[1], FinishedEvent)
    assert finish(bench.submit("after"))[0] == [2, 3, 4]


def test_several_requests_are_accepted_together_or_not_at_all(bench: Bench) -> None:
    params, events = SamplingParams(max_new_tokens=3, temperature=0.0), queue.Queue[Event]()
    five = [GenerationRequest(f"{i}", (1,), params, Selection()) for i in range(5)]
    bench.runner.gate.clear()
    running = bench.submit("running")
    assert bench.runner.entered.wait(10)
    waiting = bench.submit("waiting", n=4)
    with pytest.raises(Overloaded):
        bench.engine.submit(five, events.put)
    with pytest.raises(InvalidRequest, match="no tokens"):
        bench.engine.submit([*five[:2], GenerationRequest("empty", (), params, Selection())], events.put)
    assert bench.engine.stats().waiting == 4
    bench.engine.submit(five[:4], events.put)
    assert bench.engine.stats().waiting == 8
    bench.runner.gate.set()
    ended: set[str] = set()
    while len(ended) < 4:
        if isinstance(event := events.get(timeout=10), FinishedEvent):
            ended.add(event.request_id)
    assert ended == {"0", "1", "2", "3"}
    assert all(isinstance(finish(each)[1], FinishedEvent) for each in (running, waiting))


def test_more_choices_than_the_queue_ever_takes_are_the_requests_fault(bench: Bench) -> None:
    params = SamplingParams(max_new_tokens=3)
    three = [GenerationRequest(f"{i}", (1,), params, Selection(), n=3) for i in range(3)]
    with pytest.raises(InvalidRequest, match=r"9 choices.* takes 8 \(--max-queue\)") as refused:
        bench.engine.submit(three, lambda event: None)
    assert refused.value.param == "n"
    assert bench.engine.stats().waiting == 0


def test_whether_there_is_room_is_told_without_a_request(bench: Bench) -> None:
    bench.runner.gate.clear()
    running = bench.submit("running", n=2)
    assert bench.runner.entered.wait(10)
    waiting = [bench.submit("first", n=4)]
    bench.engine.check_room()
    waiting.append(bench.submit("last", n=4))
    with pytest.raises(Overloaded):
        bench.engine.check_room()
    bench.runner.gate.set()
    assert all(isinstance(finish(events)[1], FinishedEvent) for events in (running, *waiting))
    bench.engine.check_room()
    bench.engine.drain(10)
    with pytest.raises(EngineUnavailable):
        bench.engine.check_room()


def test_two_requests_with_one_id_are_refused(bench: Bench) -> None:
    bench.runner.gate.clear()
    first = bench.submit("same")
    with pytest.raises(InvalidRequest, match="same"):
        bench.submit("same")
    bench.runner.gate.set()
    finish(first)


def test_an_adapter_that_cannot_be_loaded_fails_its_request_alone(bench: Bench) -> None:
    bench.registry.missing.add("sha256:gone")
    gone = bench.submit("gone", "sql", "gone")
    well = bench.submit("well", "sql")
    _, end = finish(gone)
    assert isinstance(end, FailedEvent)
    assert end.code == "adapter_not_found"
    assert isinstance(finish(well)[1], FinishedEvent)


def test_a_cold_adapter_delays_no_other_request(bench: Bench) -> None:
    bench.registry.gate.clear()
    cold = bench.submit("cold", "sql")
    assert finish(bench.submit("warm"))[0] == [2, 3, 4]
    assert cold.empty()
    bench.registry.gate.set()
    assert finish(cold)[0] == [3, 5, 7]


def test_any_number_of_cold_adapters_delays_no_other_request(bench: Bench) -> None:
    bench.registry.gate.clear()
    bench.registry.loaded.add("sha256:warm")
    cold = [bench.submit(f"cold-{i}", f"adapter-{i}") for i in range(5)]
    assert finish(bench.submit("base"))[0] == [2, 3, 4]
    assert finish(bench.submit("warm", "warm"))[0] == [3, 5, 7]
    bench.registry.gate.set()
    for events in cold:
        assert finish(events)[0] == [3, 5, 7]


def test_a_deadline_passes_while_an_adapter_is_loading(bench: Bench) -> None:
    bench.registry.gate.clear()
    _, end = finish(bench.submit("late", "sql", timeout_s=0.01))
    assert isinstance(end, FailedEvent)
    assert end.code == "request_timeout"
    assert bench.registry.pinned == 0
    bench.registry.gate.set()


def test_a_fold_gives_parked_requests_their_turn(bench: Bench) -> None:
    """Its pins alone may have stood in a request's way."""
    bench.registry.room = 1
    bench.runner.gate.clear()
    blocking = bench.submit("blocking")
    assert bench.runner.entered.wait(10)
    folding = bench.engine.fold(Selection((SelectedAdapter("sql", "sha256:sql"),)))
    assert bench.registry.was_pinned.wait(10)
    parked = bench.submit("parked", "style")
    assert bench.registry.had_no_room.wait(10)
    bench.runner.gate.set()
    assert folding.result(timeout=10).merge_error == 0.25
    for events in (blocking, parked):
        assert isinstance(finish(events)[1], FinishedEvent)


def test_requests_wait_for_memory_for_their_adapters(bench: Bench) -> None:
    bench.registry.room = 1
    bench.runner.gate.clear()
    first = bench.submit("first", "sql")
    assert bench.runner.entered.wait(10)
    others = [bench.submit(f"other-{i}", f"adapter-{i}") for i in range(4)]
    base = bench.submit("base")
    assert bench.registry.pinned == 1
    bench.runner.gate.set()
    for events in [first, base, *others]:
        assert isinstance(finish(events)[1], FinishedEvent)


def test_a_request_that_waits_for_memory_is_overtaken_only_so_often() -> None:
    """Small requests for an adapter that is always in use would else keep a large blend out for ever."""
    bench = Bench(max_queue=200)
    bench.engine.start()
    bench.registry.room = 2
    bench.registry.loaded.add("sha256:sql")
    bench.runner.gate.clear()
    running = bench.submit("running", "sql")
    assert bench.runner.entered.wait(10)
    blend = bench.submit("blend", "one", "two")
    assert bench.registry.had_no_room.wait(10)
    small = [bench.submit(f"small-{i}", "sql") for i in range(100)]
    assert bench.registry.pins["sha256:sql"] == 1 + 64
    base = bench.submit("base")
    bench.runner.gate.set()
    for events in (running, base, blend, *small):
        assert isinstance(finish(events)[1], FinishedEvent)
    bench.engine.stop()
    assert bench.registry.pinned == 0


def test_cancel_while_loading_and_while_running(bench: Bench) -> None:
    bench.registry.gate.clear()
    loading = bench.submit("loading", "sql")
    bench.engine.cancel("loading")
    assert isinstance(finish(loading)[1], FinishedEvent)
    bench.registry.gate.set()
    bench.runner.gate.clear()
    running = bench.submit("running", "sql", max_new_tokens=15)
    assert bench.runner.entered.wait(10)
    bench.engine.cancel("running")
    bench.runner.gate.set()
    tokens, _ = finish(running)
    assert len(tokens) < 15
    bench.engine.cancel("never heard of")


def test_a_request_that_outlives_its_deadline_fails(bench: Bench) -> None:
    _, end = finish(bench.submit("late", timeout_s=0.0))
    assert isinstance(end, FailedEvent)
    assert end.code == "request_timeout"


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(bench: Bench) -> None:
    bench.runner.gate.clear()
    accepted = bench.submit("accepted")
    assert bench.engine.drain(0.0) is False
    assert bench.engine.state is EngineState.DRAINING
    with pytest.raises(EngineUnavailable, match="draining"):
        bench.submit("refused")
    bench.runner.gate.set()
    assert bench.engine.drain(10.0) is True
    assert finish(accepted)[0] == [2, 3, 4]


def test_stopping_fails_what_still_runs() -> None:
    bench = Bench()
    bench.engine.start()
    bench.runner.gate.clear()
    running = bench.submit("running", "sql", max_new_tokens=15)
    assert bench.runner.entered.wait(10)
    stopping = threading.Thread(target=bench.engine.stop)
    stopping.start()
    bench.runner.gate.set()
    stopping.join(10)
    assert not stopping.is_alive()
    _, end = finish(running)
    assert isinstance(end, FailedEvent)
    assert bench.registry.pinned == 0
    with pytest.raises(EngineUnavailable):
        bench.submit("after")


def test_when_the_thread_dies_every_request_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setattr(bench.engine._worker, "step", lambda: (_ for _ in ()).throw(MemoryError("no memory")))
    bench.engine.start()
    _, end = finish(bench.submit("unlucky", "sql"))
    assert isinstance(end, FailedEvent)
    assert bench.engine.state is EngineState.DEAD
    assert bench.engine.stats().running == 0, "a scrape still sees what there is"
    with pytest.raises(EngineUnavailable, match="dead"):
        bench.submit("after")
    bench.engine.stop()


def test_fold_reports_and_gives_its_pins_back(bench: Bench) -> None:
    selection = Selection((SelectedAdapter("sql", "sha256:sql"),))
    assert bench.engine.fold(selection).result(timeout=10).merge_error == 0.25
    bench.registry.missing.add("sha256:sql")
    with pytest.raises(AdapterNotFound):
        bench.engine.fold(selection).result(timeout=10)


def test_a_fold_asked_for_before_the_end_is_answered() -> None:
    bench = Bench()
    bench.engine.start()
    bench.registry.gate.clear()
    asked = bench.engine.fold(Selection((SelectedAdapter("sql", "sha256:sql"),)))
    stopping = threading.Thread(target=bench.engine.stop)
    stopping.start()
    bench.engine._thread.join(10)
    bench.registry.gate.set()
    stopping.join(10)
    assert asked.done(), "nobody is left waiting"
    with pytest.raises(EngineUnavailable):
        bench.engine.fold(Selection())


def test_what_keys_and_values_take_is_told_while_they_are_there(bench: Bench) -> None:
    bench.runner.room = 1000
    taken: list[int] = []
    ended = threading.Event()

    def sink(event: Event) -> None:
        taken.append(bench.engine.stats().kv_bytes // TOKEN_BYTES)
        if isinstance(event, FinishedEvent):
            ended.set()

    params = SamplingParams(max_new_tokens=3, temperature=0.0)
    bench.engine.submit([GenerationRequest("r", (1, 2, 3), params, Selection())], sink)
    assert ended.wait(10)
    assert taken == [3, 4, 5, 5]
    assert bench.engine.stats().kv_budget_bytes == 1000


def test_a_text_that_cannot_be_decoded_when_its_request_is_cancelled_harms_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.runner.gate.clear()
    events, other = bench.submit("unlucky"), bench.submit("well", prompt=(5,))
    assert bench.runner.entered.wait(10)
    finish_text = TextStream.finish
    monkeypatch.setattr(TextStream, "finish", lambda text: 1 / 0 if 2 in text._ids else finish_text(text))
    bench.engine.cancel("unlucky")
    bench.runner.gate.set()
    assert isinstance(finish(events)[1], FailedEvent)
    assert finish(other)[0] == [6, 7, 8]
    assert bench.engine.state is EngineState.READY


def test_a_request_of_another_task_is_refused(bench: Bench) -> None:
    with pytest.raises(WrongTask, match="--task generate"):
        bench.submit("a", task=Task.CLASSIFY)


def test_stats_say_what_the_batch_is_made_of_and_for_whom(bench: Bench) -> None:
    assert bench.engine.stats().batch == ()
    bench.runner.gate.clear()
    running = bench.submit("running", "sql", tenant="acme", n=2)
    assert bench.runner.entered.wait(10)
    waiting = bench.submit("waiting", tenant="rival")
    stats = bench.engine.stats()
    selection = Selection((SelectedAdapter("sql", "sha256:sql"),))
    assert (stats.batch, stats.running, stats.waiting) == ((BatchShare("acme", selection, 2),), 2, 1)
    bench.runner.gate.set()
    for events in (running, waiting):
        finish(events)


def test_limits_are_told(bench: Bench) -> None:
    assert (bench.engine.max_batch_size, bench.engine.max_queue, bench.engine.max_context) == (2, 8, 20)
