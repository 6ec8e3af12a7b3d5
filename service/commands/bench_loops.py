"""Closed and open loops of requests, and the record of what became of each, which outlives an interruption."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from service.commands.bench_client import Outcome
from service.commands.bench_plan import Ask

AskServer = Callable[[Ask], Awaitable[Outcome]]


@dataclass(slots=True)
class Record:
    """Requests under way and ended. `seen` is called for each that ends."""

    begun: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    seen: Callable[[Outcome], None] = lambda outcome: None

    @property
    def unfinished(self) -> int:
        return self.begun - len(self.outcomes)

    async def of(self, ask_server: AskServer, ask: Ask) -> Outcome:
        self.begun += 1
        outcome = await ask_server(ask)
        self.outcomes.append(outcome)
        self.seen(outcome)
        return outcome


async def closed_loop(ask_server: AskServer, asks: Sequence[Ask], clients: int, record: Record) -> None:
    """So many clients, each of which asks for the next when its last has ended, or when it is told to come back."""
    waiting = iter(asks)

    async def client() -> None:
        for ask in waiting:
            outcome = await record.of(ask_server, ask)
            if outcome.retry_after_s:
                await asyncio.sleep(outcome.retry_after_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(clients, len(asks))):
            group.create_task(client())


async def open_loop(ask_server: AskServer, asks: Sequence[Ask], at: Sequence[float], record: Record) -> None:
    """Requests that come when they come, `at` seconds from now, whatever became of those before them."""

    async def arrive(ask: Ask, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await record.of(ask_server, ask)

    async with asyncio.TaskGroup() as group:
        for ask, after_s in zip(asks, at, strict=True):
            group.create_task(arrive(ask, after_s))
