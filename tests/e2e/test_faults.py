"""What fails inside a whole server ends the request that it belongs to, and no other; a full server refuses at once."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event as Gate
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import intake as intake_module
from benchmarks.load.client import Ending, LoadClient, Outcome, by_ending
from benchmarks.load.plan import Ask, Leaving, Mix
from service.api.generation import EventStream
from service.api.observation import Observation
from service.engine import sampler
from service.engine.events import Event, FailedEvent, FinishedEvent, TokenEvent
from service.engine.job import Job
from service.engine.seam import EngineState
from service.setting_kinds import AdapterSource
from service.settings import Settings
from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.in_process import InProcessServer

pytestmark = pytest.mark.anyio

ADAPTERS = ("one", "two", "guilty")
BATCH, QUEUE = 4, 8
GUILTY = 200  # a token that no innocent prompt holds
TOKENS = 24
WAIT_S = 60


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("faults")
    model = tiny_model("llama", max_position_embeddings=2048)
    save_model(model, folder / "base")
    sources = [
        AdapterSource(name, str(make_adapter(model, AdapterSpec(seed=seed), folder / name)))
        for seed, name in enumerate(ADAPTERS)
    ]
    return Settings(
        model=str(folder / "base"),
        data_dir=folder / "data",
        adapter=tuple(sources),
        threads=1,
        max_batch_size=BATCH,
        max_queue=QUEUE,
    )


@pytest.fixture(scope="module")
def shared(settings: Settings) -> Iterator[InProcessServer]:
    with InProcessServer(settings) as server:
        yield server


@pytest.fixture
def server(shared: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessServer]:
    """The shared server; afterwards, whatever failed, it is at rest, takes requests and holds nothing."""
    yield shared
    monkeypatch.undo()
    assert shared.engine.state is EngineState.READY
    wait_for(lambda: not held(shared))


def held(server: InProcessServer) -> dict[str, int]:
    """What is not zero of all that must be when nothing is asked."""
    stats = server.engine.stats()
    pins = sum(server.registry.status(digest).pins for digest in list(server.registry._live))
    values = {"waiting": stats.waiting, "running": stats.running, "kv_bytes": stats.kv_bytes, "pins": pins}
    return {name: value for name, value in values.items() if value}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.01)


# --- faults ---------------------------------------------------------------------------------------

Inject = Callable[[InProcessServer, pytest.MonkeyPatch], None]


def _in_forward(change: Callable[[Tensor, list[int]], Tensor]) -> Inject:
    """Something happens to every forward that is given the guilty token; `change` gets the rows that hold it."""

    def inject(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
        extend = server.runner.extend

        def failing(rows: Sequence[int], tokens: Sequence[Sequence[int]], *arguments: Any, **options: Any) -> Tensor:
            token_logits = extend(rows, tokens, *arguments, **options)
            guilty = [i for i, of_row in enumerate(tokens) if GUILTY in of_row]
            return change(token_logits, guilty) if guilty else token_logits

        monkeypatch.setattr(server.runner, "extend", failing)

    return inject


def _out_of_memory(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written: a forward that raises has not happened."""
    extend = server.runner.extend

    def failing(rows: Sequence[int], tokens: Sequence[Sequence[int]], *arguments: Any, **options: Any) -> Tensor:
        if any(GUILTY in of_row for of_row in tokens):
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return extend(rows, tokens, *arguments, **options)

    monkeypatch.setattr(server.runner, "extend", failing)


def _nan(token_logits: Tensor, guilty: list[int]) -> Tensor:
    return token_logits.index_fill(0, torch.tensor(guilty), torch.nan)


def _in_the_model(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of it: some layers' keys and values are written already."""
    model = server.runner._adapted.model  # type: ignore[attr-defined]
    forward = model.lm_head.forward

    def failing(hidden: Tensor) -> Tensor:
        if armed:
            raise RuntimeError("CUDA out of memory, says an older PyTorch")
        return forward(hidden)

    extend, armed = server.runner.extend, []

    def arming(rows: Sequence[int], tokens: Sequence[Sequence[int]], *arguments: Any, **options: Any) -> Tensor:
        armed[:] = [row for row, of_row in zip(rows, tokens, strict=True) if GUILTY in of_row]
        return extend(rows, tokens, *arguments, **options)

    monkeypatch.setattr(model.lm_head, "forward", failing)
    monkeypatch.setattr(server.runner, "extend", arming)


def _in_sampling(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = sampler.sample

    def failing(token_logits: Tensor, rows: Sequence[sampler.SamplingRow]) -> list[int]:
        assert not any(GUILTY in row.prompt for row in rows), "the guilty one is sampled"
        return sample(token_logits, rows)

    monkeypatch.setattr(sampler, "sample", failing)


def _in_detokenizer(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = server.engine._decoder

    class Failing:
        def decode(self, ids: Sequence[int]) -> str:
            if GUILTY in ids:
                raise ValueError("no such bytes")
            return decoder.decode(ids)

    monkeypatch.setattr(server.engine, "_decoder", Failing())


def _in_sink(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver = EventStream._deliver

    def failing(events: EventStream, event: Event) -> None:
        request = events._observation._generations[event.request_id].request
        if GUILTY in request.prompt_ids and isinstance(event, TokenEvent):
            raise MemoryError
        deliver(events, event)

    monkeypatch.setattr(EventStream, "_deliver", failing)


def _in_composing(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, compose = server.registry, server.registry._compose
    digest = registry.store.get("", "guilty").digest
    registry._live.pop(digest, None)  # cold again

    def failing(of: str, compact: Any) -> Any:
        if of == digest:
            raise RuntimeError("composing failed")
        return compose(of, compact)

    monkeypatch.setattr(registry, "_compose", failing)


def _on_disk(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = server.registry
    digest = registry.store.get("", "guilty").digest
    registry._live.pop(digest, None)
    digest_of = intake_module.digest_of

    def failing(directory: Path) -> str:
        if directory == registry.store.path(digest):
            raise OSError(errno.EIO, "Input/output error")
        return digest_of(directory)

    monkeypatch.setattr(intake_module, "digest_of", failing)


def _in_loader(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = server.registry.pin
    digest = server.registry.store.get("", "guilty").digest
    server.registry._live.pop(digest, None)

    def failing(of: str) -> Any:
        if of == digest:
            raise MemoryError
        return pin(of)

    monkeypatch.setattr(server.registry, "pin", failing)


FAULTS: dict[str, Inject] = {
    "out of memory": _out_of_memory,
    "out of memory in the middle": _in_the_model,
    "NaN": _in_forward(_nan),
    "sampling": _in_sampling,
    "detokenizer": _in_detokenizer,
    "sink": _in_sink,
    "composing": _in_composing,
    "disk": _on_disk,
    "loader": _in_loader,
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_ends_the_guilty_request_alone(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch, fault: str, stream: bool
) -> None:
    neighbours = [ask(f"neighbour-{i}", i, stream=i % 2 == 0) for i in range(BATCH + 2)]
    guilty = ask("guilty", GUILTY, adapter="guilty", stream=stream)
    async with LoadClient(server.url) as client:
        expected = [outcome.texts for outcome in await client.run(neighbours, at_once=1)]
        innocent = (await client.ask(guilty)).texts
        FAULTS[fault](server, monkeypatch)
        outcomes = await client.run([*neighbours[:3], guilty, *neighbours[3:]], at_once=BATCH + 3)
        of_guilty = outcomes.pop(3)
        assert (of_guilty.ending, of_guilty.code) == (Ending.FAILED, "internal_error")
        assert [outcome.texts for outcome in outcomes] == expected
        monkeypatch.undo()
        assert (await client.ask(guilty)).texts == innocent, "what has passed is forgotten"


def ask(name: str, token: int, *, stream: bool, adapter: str | None = None, **fields: Any) -> Ask:
    """A greedy request whose prompt ends with that token."""
    chosen = adapter or ("base", "one", "two")[token % 3]
    body = {"prompt": [65, 66, 67, 68, token], "adapter": chosen, "temperature": 0, "ignore_eos": True}
    return Ask(name, "/v1/generate", body | {"max_new_tokens": TOKENS, "stream": stream} | fields)


async def test_a_fault_after_the_first_token_is_an_error_event(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every forward fails from the fifth on: all streams have begun, and each is told."""
    extend, forwards = server.runner.extend, [0]

    def failing(*arguments: Any, **options: Any) -> Tensor:
        forwards[0] += 1
        if forwards[0] > 5:
            raise torch.OutOfMemoryError("nothing is left")
        return extend(*arguments, **options)

    monkeypatch.setattr(server.runner, "extend", failing)
    async with LoadClient(server.url) as client:
        outcomes = await client.run([ask("alone", 1, stream=True)], at_once=1)
    (outcome,) = outcomes
    assert (outcome.status, outcome.ending, outcome.code) == (200, Ending.FAILED, "internal_error")
    assert outcome.texts


# --- overload -------------------------------------------------------------------------------------


async def test_what_is_refused_waits_for_no_step(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times what fits, while the model's thread is stuck in one forward."""
    gate, entered = held_forwards(server, monkeypatch)
    accepted = QUEUE + 1
    async with LoadClient(server.url) as client:
        first = asyncio.create_task(client.ask(ask("first", 1, stream=False)))
        assert await asyncio.to_thread(entered.wait, WAIT_S)
        asks = [ask(f"offered-{i}", i % 9, stream=i % 2 == 0) for i in range(10 * accepted)]
        refused: list[Outcome] = []
        offered = asyncio.create_task(client.run(asks, at_once=len(asks), seen=refused.append))
        await asyncio.to_thread(wait_for, lambda: len(refused) >= len(asks) - QUEUE)
        assert by_ending(refused) == {"overloaded": len(asks) - QUEUE}
        gate.set()
        assert by_ending([await first, *await offered]) == {"answered": accepted, "overloaded": len(asks) - QUEUE}


def held_forwards(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> tuple[Gate, Gate]:
    """The gate that forwards wait at, and what tells that one does."""
    gate, entered, extend = Gate(), Gate(), server.runner.extend

    def waiting(*arguments: Any, **options: Any) -> Tensor:
        entered.set()
        assert gate.wait(WAIT_S)
        return extend(*arguments, **options)

    monkeypatch.setattr(server.runner, "extend", waiting)
    return gate, entered


async def test_under_overload_no_accepted_request_waits_for_more_than_its_share(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In requests, not in seconds: how many others ended between a request's acceptance and its own end.

    Of those accepted before it there are at most a queue and a batch full. Later ones may come first only while their
    adapters have been served less: for every one of its own adapter's ahead of it, one of each other.
    """
    waited: list[int] = []
    ended = [0]
    submit = server.engine.submit

    def counting(request: Any, sink: Callable[[Event], None]) -> None:
        accepted = ended[0]

        def watching(event: Event) -> None:
            if isinstance(event, FinishedEvent | FailedEvent):
                waited.append(ended[0] - accepted)
                ended[0] += 1
            sink(event)

        submit(request, watching)

    monkeypatch.setattr(server.engine, "submit", counting)
    shares, enough = 3, 2 * (BATCH + QUEUE)

    def offered() -> Iterator[Ask]:
        """Until enough have ended: how many are refused meanwhile depends on how quick the model is."""
        count = 0
        while ended[0] < enough:
            yield ask(f"overload-{count}", count % shares, stream=count % 2 == 0)
            count += 1

    async def one_after_another(client: LoadClient, asks: Iterator[Ask]) -> list[Outcome]:
        return [await client.ask(each) for each in asks]

    asks = offered()
    async with LoadClient(server.url) as client:
        clients = [one_after_another(client, asks) for _ in range(10 * (BATCH + QUEUE))]
        outcomes = [outcome for of_one in await asyncio.gather(*clients) for outcome in of_one]
    counts = by_ending(outcomes)
    assert counts.keys() == {"answered", "overloaded"}, "or nothing had to wait"
    assert counts["answered"] == len(waited) >= enough
    assert max(waited) <= (BATCH + QUEUE) * shares


# --- what is left ---------------------------------------------------------------------------------


async def test_nothing_is_kept_of_requests_that_have_ended(server: InProcessServer) -> None:
    """Answered, refused, failed, left: not one object of theirs is alive."""
    others = alive(Job, EventStream, Observation)  # of other servers, and of failed tests
    mix = Mix(("one", "two"), leaving=0.4)
    async with LoadClient(server.url) as client:
        outcomes = await client.run(mix.asks(150, seed="kept"), at_once=3 * (BATCH + QUEUE))
        late = ask("late", 1, stream=True, max_new_tokens=1500, timeout_s=0.2)
        outcomes += await client.run([late, Ask("left", late.path, late.body, Leaving(events=2))], at_once=2)
    assert by_ending(outcomes).keys() >= {"answered", "left", "overloaded", "request_timeout"}
    wait_for(lambda: not held(server))
    server.generate("one more", adapter="base")  # what local variables held is let go of
    wait_for(lambda: not alive(Job, EventStream, Observation, but=others))


def alive(*kinds: type, but: Sequence[object] = ()) -> list[object]:
    gc.collect()
    known = set(map(id, but))
    return [each for each in gc.get_objects() if isinstance(each, kinds) and id(each) not in known]


async def test_a_stream_that_is_not_read_is_kept_only_as_far_as_its_tokens(server: InProcessServer) -> None:
    """Its events wait for the client, of which there are no more than tokens were asked for; then it is cancelled."""
    others = alive(EventStream)
    body = {**ask("", 1, stream=True).body, "max_new_tokens": 1000, "logprobs": 20, "n": 4}
    raw = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(*server.url.removeprefix("http://").split(":"), limit=1)
    head = (
        f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    writer.write(head.encode() + raw)
    await reader.readexactly(1)
    tokens = server.engine.stats().completion_tokens
    await asyncio.to_thread(wait_for, lambda: server.engine.stats().completion_tokens >= tokens + 50)
    queues = [stream._queue.qsize() for stream in alive(EventStream, but=others)]  # type: ignore[attr-defined]
    assert len(queues) == 1
    assert queues[0] <= 4 * 1000 + 1
    writer.transport.abort()
    await asyncio.to_thread(wait_for, lambda: not held(server))
