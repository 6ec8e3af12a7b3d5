"""Ten thousand adapters: listed whole, in order, and with work that grows no faster than what is shown.

Work is what SQLite counts: statements, and steps of its virtual machine. Neither depends on the machine's load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from tests.api.conftest import Server

ADAPTERS = 10_000
NAMES = [f"adapter-{i:05}" for i in range(ADAPTERS)]
STEPS_AT_A_TIME = 100


@dataclass
class Work:
    statements: list[str] = field(default_factory=list)
    steps: int = 0


@pytest.fixture
def crowd(server: Server) -> Server:
    """One adapter's files under many names. The rows are written at once: each on its own would be synced to disk."""
    server.upload(NAMES[0])
    version = server.store.get("", NAMES[0]).versions[0]
    with server.store._writing() as catalog:
        for name in NAMES[1:]:
            catalog.put("", name, version)
    return server


@contextmanager
def work_of(server: Server) -> Iterator[Work]:
    work, connection = Work(), server.store._database.connection

    def step() -> None:
        work.steps += STEPS_AT_A_TIME

    connection.set_trace_callback(work.statements.append)
    connection.set_progress_handler(step, STEPS_AT_A_TIME)
    try:
        yield work
    finally:
        connection.set_trace_callback(None)
        connection.set_progress_handler(None, 0)


def page(server: Server, route: str, limit: int, after: str | None = None) -> tuple[list[str], str | None, Work]:
    with work_of(server) as work:
        response = server.client.get(route, params={"limit": limit} | ({"after": after} if after else {}))
    assert response.status_code == 200
    body = response.json()
    entries = [entry.get("name") or entry["adapter"] for entry in body.get("data") or body["adapters"]]
    return entries, body["next"], work


@pytest.mark.parametrize("route", ["/v1/adapters", "/v1/parameters"])
def test_pages_cost_the_same_from_the_first_to_the_last(crowd: Server, route: str) -> None:
    found, works, after = [], [], None
    for _ in range(10):
        names, after, work = page(crowd, route, 1000, after)
        found += names
        works.append(work)
    assert after is None
    assert found == NAMES
    assert len({len(work.statements) for work in works}) == 1
    steps = [work.steps for work in works]
    assert max(steps) <= 1.2 * min(steps)


def test_a_page_costs_by_what_it_shows(crowd: Server) -> None:
    _, _, small = page(crowd, "/v1/adapters", 100, NAMES[5000])
    _, _, large = page(crowd, "/v1/adapters", 1000, NAMES[5000])
    assert len(small.statements) == len(large.statements) <= 3
    assert small.steps >= 1000, "work is counted"
    assert large.steps <= 12 * small.steps


def test_models_are_listed_in_one_statement(crowd: Server) -> None:
    with work_of(crowd) as work:
        models = crowd.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models[1:]] == NAMES
    assert len(work.statements) == 1
    assert work.steps <= 20 * ADAPTERS


def test_one_among_many_is_found_directly(crowd: Server) -> None:
    for path in (f"/v1/adapters/{NAMES[7000]}", f"/v1/models/{NAMES[7000]}"):
        with work_of(crowd) as work:
            assert crowd.client.get(path).status_code == 200
        assert work.steps <= 1000


def test_a_request_selects_one_among_many_directly(crowd: Server) -> None:
    with work_of(crowd) as work:
        assert crowd.generate(adapter=NAMES[7000]).status_code == 200
    assert work.steps <= 1000
