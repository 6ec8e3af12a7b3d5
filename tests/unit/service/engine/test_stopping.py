"""Stopping an engine: everyone is told in time and once, whatever its threads are in the middle of."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from service.engine import engine as engine_module
from service.engine.errors import EngineUnavailable
from service.engine.events import Event, FailedEvent, FinishedEvent, Timing, TokenEvent, Usage
from service.engine.fatal import ShardsLost
from service.engine.outlet import Outlet
from service.engine.seam import EngineState
from service.engine.selection import SelectedAdapter, Selection
from tests.unit.service.engine.test_engine import Bench, finish

FAILED = FailedEvent("a", "internal_error", "the server stopped before the request was finished")
TOKEN = TokenEvent("a", 0, (1,), "x")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """One that is patient for a moment only, and whose threads are let go in the end."""
    monkeypatch.setattr(engine_module, "_LAST_STEP_S", 0.05)
    bench = Bench()
    bench.engine.start()
    yield bench
    bench.runner.gate.set()
    bench.registry.gate.set()
    bench.engine.stop()


@pytest.fixture
def stopping(bench: Bench) -> Iterator[threading.Thread]:
    """Stops the engine, when it is started."""
    thread = threading.Thread(target=bench.engine.stop)
    yield thread
    bench.runner.gate.set()
    bench.registry.gate.set()
    thread.join(10)
    assert not thread.is_alive()


def rest(events: queue.Queue[Event]) -> list[Event]:
    return [events.get_nowait() for _ in range(events.qsize())]


def test_a_step_that_stands_still_keeps_nobody_waiting(bench: Bench, stopping: threading.Thread) -> None:
    bench.runner.gate.clear()
    running = bench.submit("a", "sql")
    assert bench.runner.entered.wait(10)
    waiting = bench.submit("b")
    stopping.start()
    assert finish(running) == ([], FAILED)
    assert finish(waiting)[1] == FailedEvent("b", FAILED.code, FAILED.message)
    assert stopping.is_alive(), "the step has not ended"
    bench.runner.gate.set()
    stopping.join(10)
    assert rest(running) + rest(waiting) == [], "what the step came to is told nobody"
    assert bench.registry.pinned == 0


def test_a_file_that_is_never_read_keeps_nobody_waiting(bench: Bench, stopping: threading.Thread) -> None:
    bench.registry.gate.clear()
    events = bench.submit("a", "sql")
    stopping.start()
    assert finish(events) == ([], FAILED)
    bench.registry.gate.set()
    stopping.join(10)
    assert rest(events) == []
    assert bench.registry.pinned == 0


def test_a_fold_is_answered_too(bench: Bench, stopping: threading.Thread) -> None:
    bench.registry.gate.clear()
    future = bench.engine.fold(Selection((SelectedAdapter("sql", "sha256:sql"),)))
    stopping.start()
    with pytest.raises(EngineUnavailable, match="stopped"):
        future.result(10)


def test_in_a_dead_engine_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the step that was its last had begun with."""
    bench = Bench()
    monkeypatch.setattr(bench.runner, "extend", lambda *_, **__: (_ for _ in ()).throw(ShardsLost("a part is gone")))
    bench.engine.start()
    assert isinstance(finish(bench.submit("a", "sql"))[1], FailedEvent)
    assert bench.engine.state is EngineState.DEAD
    assert bench.engine._worker.running, "as it was left"
    stats = bench.engine.stats()
    assert (stats.running, stats.distinct_adapters, stats.batch) == (0, 0, ())
    bench.engine.stop()


class TestOutlet:
    def test_nothing_follows_the_last_event(self) -> None:
        events: list[Event] = []
        outlet = Outlet(events.append)
        finished = FinishedEvent("a", Usage(1, 1, 0), Timing(0.0, 0.0, 0.0), "switch")
        outlet.send(TOKEN)
        outlet.close(finished)
        outlet.send(TOKEN)
        outlet.close(FAILED)
        assert events == [TOKEN, finished]

    def test_a_sink_that_fails_at_the_last_event_has_had_it(self) -> None:
        told: list[Event] = []

        def broken(event: Event) -> None:
            told.append(event)
            raise RuntimeError

        outlet = Outlet(broken)
        with pytest.raises(RuntimeError):
            outlet.close(FAILED)
        outlet.close(FAILED)
        outlet.send(TOKEN)
        assert told == [FAILED]

    def test_of_many_threads_one_has_the_last_word(self) -> None:
        events: list[Event] = []
        outlet = Outlet(events.append)
        ready = threading.Barrier(8)

        def race(own: int) -> None:
            ready.wait(10)
            outlet.send(TOKEN)
            outlet.close(FailedEvent("a", "internal_error", str(own)))

        threads = [threading.Thread(target=race, args=(own,)) for own in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert [isinstance(event, FailedEvent) for event in events].count(True) == 1
        assert isinstance(events[-1], FailedEvent)
