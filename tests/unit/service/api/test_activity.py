"""What the server counts for its page."""

from __future__ import annotations

import threading

import pytest

from service.api.activity import MOST_LATENCIES, WINDOW_S, LatencySummary, LatencyWindow, RequestCounts
from service.engine.selection import SelectedAdapter, Selection


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def using(*names: str, owner: str = "") -> Selection:
    return Selection(tuple(SelectedAdapter(name, f"sha256:{name}", 0.5, owner) for name in names))


def test_percentiles_are_values_that_were_seen(clock: Clock) -> None:
    window = LatencyWindow(clock)
    assert window.summary() == LatencySummary(0, None, None)
    window.add(7.0)
    assert window.summary() == LatencySummary(1, 7.0, 7.0)
    for value in reversed(range(1, 100)):
        window.add(float(value))
    assert window.summary() == LatencySummary(100, 49.0, 94.0)  # 7 is there twice, 100 is not


def test_what_is_a_minute_old_is_forgotten(clock: Clock) -> None:
    window = LatencyWindow(clock)
    window.add(1.0)
    clock.now += WINDOW_S
    window.add(2.0)
    assert window.summary().count == 2
    clock.now += 0.001
    assert window.summary() == LatencySummary(1, 2.0, 2.0)
    clock.now += WINDOW_S
    assert window.summary() == LatencySummary(0, None, None)


def test_a_window_holds_only_so_many(clock: Clock) -> None:
    window = LatencyWindow(clock)
    for _ in range(MOST_LATENCIES):
        window.add(1.0)
    window.add(3.0)
    assert window.summary().count == MOST_LATENCIES
    for _ in range(MOST_LATENCIES):
        window.add(2.0)
    assert window.summary() == LatencySummary(MOST_LATENCIES, 2.0, 2.0), "the newest"


def test_each_tenant_reads_its_own_and_the_shared_one_everyones() -> None:
    counts = RequestCounts()
    counts.count(using("sql"), "acme")
    counts.count(using("sql", "style"), "rival")
    counts.count(using("sql"), "")
    counts.count(using("sql", owner="acme"), "acme")
    assert [counts.of("", "sql", reader) for reader in ("", "acme", "rival", "nobody")] == [3, 1, 1, 0]
    assert [counts.of("", "style", reader) for reader in ("", "acme", "rival")] == [1, 0, 1]
    assert [counts.of("acme", "sql", reader) for reader in ("acme", "rival")] == [1, 0], "another of that name"
    assert counts.of("", "unused", "") == 0


def test_the_base_counts_for_no_adapter() -> None:
    counts = RequestCounts()
    counts.count(Selection(), "")
    assert counts.of("", "base", "") == 0


def test_a_deleted_adapter_is_forgotten() -> None:
    counts = RequestCounts()
    for owner in ("", "acme"):
        counts.count(using("sql", owner=owner), "acme")
    counts.forget("", "sql")
    counts.forget("", "never seen")
    assert counts.of("", "sql", "") == 0
    assert counts.of("acme", "sql", "acme") == 1


def test_names_do_not_take_memory_without_end() -> None:
    counts = RequestCounts(most=2)
    for name in ("a", "b", "a", "c"):
        counts.count(using(name), "")
    assert [counts.of("", name, "") for name in "abc"] == [2, 0, 1], "the one that was used longest ago goes"
    for i in range(100):
        counts.of("", f"asked {i}", "")
        counts.count(using(f"used {i}"), "")
    assert len(counts._counts) == 2


def test_no_request_is_lost_between_threads() -> None:
    counts, window = RequestCounts(), LatencyWindow()

    def count() -> None:
        for _ in range(2000):
            counts.count(using("sql"), "acme")
            window.add(0.1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert window.summary().count <= MOST_LATENCIES
        assert counts.of("", "sql", "") <= 8000
    for thread in threads:
        thread.join()
    assert counts.of("", "sql", "acme") == 8000
