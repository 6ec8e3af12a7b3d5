"""A real server under load: overload, clients that leave or stall, adapters that change, signals; and what is left.

Nothing here is judged by a clock. What has to be true at some moment is waited for.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedModel

from benchmarks.load.client import Ending, LoadClient, Outcome, by_ending
from benchmarks.load.gauges import Gauges, Observer
from benchmarks.load.plan import Ask, Mix
from tests.factories import (
    AdapterSpec,
    byte_tokenizer,
    make_adapter,
    peft_greedy,
    peft_reference,
    save_model,
    tiny_model,
)
from tests.server import Server, parts

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

ADAPTERS = ("one", "two", "three")
VERSIONS = 4
CONTEXT = 4096
MIX = Mix(ADAPTERS)
PROMPT = b"The quick brown fox"
TOKENS = 12
BATCH, QUEUE = 8, 16
MOST_THREADS = 80  # of the event loop's pools, which keep theirs for a while, the engine's, and the libraries'
MOST_GROWTH = 32 << 20
WAIT_S = 60


@dataclass(frozen=True)
class Stage:
    """A base model that can write for long, adapters for it, and versions of one more."""

    folder: Path
    model: PreTrainedModel

    def server(self, *arguments: str, data: str, queue: int = QUEUE) -> Server:
        adapters = ",".join(f"{name}={self.folder / name}" for name in ADAPTERS)
        limits = ("--max-batch-size", f"{BATCH}", "--max-queue", f"{queue}", "--threads", "1", "--kv-memory", "64MiB")
        return Server(
            *("serve", "--model", str(self.folder / "base"), "--log-format", "json", *limits, *arguments),
            data_dir=self.folder / data,
            environ={"VBLORA_ADAPTER": adapters},
        )

    def text(self, adapter: str | None) -> str:
        """What PEFT answers the prompt, greedily."""
        model = self.model if adapter is None else peft_reference(self.model, self.folder / adapter)
        return str(byte_tokenizer().decode(peft_greedy(model, list(PROMPT), TOKENS), skip_special_tokens=True))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("load")
    model = tiny_model("llama", max_position_embeddings=CONTEXT)
    save_model(model, folder / "base")
    for seed, name in enumerate([*ADAPTERS, *(f"version-{i}" for i in range(VERSIONS))]):
        make_adapter(model, AdapterSpec(seed=seed), folder / name)
    return Stage(folder, model)


@pytest.fixture(scope="module")
def server(stage: Stage) -> Iterator[Server]:
    """That all tests share which do not end it: what one leaves behind, the next would notice."""
    with stage.server(data="data") as server:
        yield server


@pytest.fixture(scope="module")
def observer(server: Server) -> Observer:
    return Observer(server.http, server.process.pid)


@pytest.fixture
async def client(server: Server) -> Any:
    async with LoadClient(server.url) as client:
        yield client


@pytest.fixture(autouse=True)
def at_rest(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does to the shared server: afterwards nothing is queued, running, pinned or open."""
    if "server" not in request.fixturenames:
        yield
        return
    observer: Observer = request.getfixturevalue("observer")
    before = observer.wait()
    yield
    after = observer.wait(lambda gauges: gauges.open_files <= before.open_files)
    assert after.threads <= MOST_THREADS


async def test_every_request_of_a_mix_is_answered_and_counted_once(
    server: Server, observer: Observer, client: LoadClient
) -> None:
    before = observer.wait()
    asks = MIX.asks(80, seed="mix")
    outcomes = await client.run(asks, at_once=4)
    assert by_ending(outcomes) == {"answered": 80}
    assert {outcome.ask.path for outcome in outcomes} == {
        "/v1/generate",
        "/v1/completions",
        "/v1/chat/completions",
    }
    after = observer.wait()
    lines = access_lines(server, asks)
    assert len(lines) == len(asks)
    assert after.accepted - before.accepted == sum(map(prompts, asks))
    assert after.finished - before.finished == sum(map(choices, asks))


async def test_of_ten_times_too_much_each_is_answered_or_refused(client: LoadClient, observer: Observer) -> None:
    at_once = 10 * (BATCH + QUEUE)
    asks = MIX.asks(2 * at_once, seed="flood")
    ended: list[Outcome] = []
    outcomes = await client.run(asks, at_once, seen=ended.append)
    counts = by_ending(outcomes)
    assert counts.keys() == {"answered", "overloaded"}
    assert counts["answered"] >= BATCH + QUEUE
    refused = [i for i, outcome in enumerate(ended) if outcome.ending is Ending.REFUSED]
    answered = [i for i, outcome in enumerate(ended) if outcome.ending is Ending.ANSWERED]
    assert refused[0] < answered[-1], "the refused need not wait for the accepted"


async def test_a_refusal_waits_for_nobody(server: Server, observer: Observer, client: LoadClient) -> None:
    """All that runs and waits outlives all refusals, which come while it does."""
    long = [asyncio.create_task(client.ask(stream_ask(f"runs-{i}", tokens=3000))) for i in range(BATCH)]
    await until(lambda: observer.read().running == BATCH)
    long += [asyncio.create_task(client.ask(stream_ask(f"waits-{i}", tokens=3000))) for i in range(QUEUE)]
    await until(lambda: observer.read().queue_depth == QUEUE)
    asks = MIX.asks(100, seed="refused")
    outcomes = await client.run(asks, at_once=50)
    assert by_ending(outcomes) == {"overloaded": 100}
    assert not any(task.done() for task in long)
    for task in long:
        task.cancel()
    await asyncio.gather(*long, return_exceptions=True)


async def test_five_hundred_clients_leave_at_any_moment(stage: Stage) -> None:
    with stage.server(data="left", queue=2000) as server:
        observer = Observer(server.http, server.process.pid)
        before = observer.wait()
        asks = Mix(ADAPTERS, tokens=60, leaving=1.0).asks(500, seed="left")
        async with LoadClient(server.url) as client:
            outcomes = await client.run(asks, at_once=60)
            counts = by_ending(outcomes)
            assert counts.keys() <= {"left", "answered"}
            assert counts["left"] > 300
        after = observer.wait(lambda gauges: gauges.open_files <= before.open_files)
        assert server.generate(PROMPT.decode(), adapter="one", max_new_tokens=TOKENS, ignore_eos=True)
        assert server.stop() == 0
        lines = access_lines(server, asks)
        assert len({line["request_id"] for line in lines}) == len(lines), "one line for each"
        assert {line["request_id"] for line in lines} >= {
            outcome.ask.name for outcome in outcomes if outcome.status is not None
        }
        ids = {line["request_id"] for line in lines if "generation_id" in line}
        begun = [ask for ask in asks if ask.name in ids]
        assert after.finished == sum(map(choices, begun)), "each choice ended once"
        assert after.accepted == sum(map(prompts, begun))
        assert any(line.get("code") == "client_disconnected" and line["status"] == 200 for line in lines)
        assert any(line.get("code") == "client_disconnected" and line["status"] == 499 for line in lines)


# --- adapters that change -------------------------------------------------------------------------


@dataclass
class History:
    """Which digests a name has had, and between which moments of this side it may have had them."""

    periods: list[tuple[str, float, float]] = field(default_factory=list)

    async def change(self, digest: str, doing: Coroutine[Any, Any, httpx.Response], *codes: int) -> None:
        """Has something done after which the name stands for `digest`."""
        began = time.monotonic()
        response = await doing
        assert response.status_code in (codes or (200, 201)), response.text
        if self.periods:
            before, start, _ = self.periods[-1]
            self.periods[-1] = before, start, time.monotonic()
        self.periods.append((digest, began, float("inf")))

    def possible(self, outcome: Outcome) -> set[str]:
        return {digest for digest, start, end in self.periods if start <= outcome.ended and outcome.asked <= end}


async def test_adapters_change_under_traffic(server: Server, stage: Stage, client: LoadClient) -> None:
    """Every answer is of a version that was current while it was asked for, whole, and as PEFT answers it."""
    versions = [f"version-{i}" for i in range(VERSIONS)]
    texts = [stage.text(version) for version in versions]
    assert len({*texts, stage.text(None)}) == VERSIONS + 1, "or versions cannot be told apart"
    digests = [server.upload("style", stage.folder / version, replace="true").json()["digest"] for version in versions]
    text_of = {"base": stage.text(None), **dict(zip(digests, texts, strict=True))}
    style, active, gone = History(), History(), History()

    async def put(name: str, version: int) -> httpx.Response:
        files = parts(stage.folder / versions[version])
        return await client.http.post("/v1/adapters", params={"replace": "true"}, data={"name": name}, files=files)

    async def post(path: str, **body: str) -> httpx.Response:
        return await client.http.post(f"/v1/adapters/{path}", json=body)

    await style.change(digests[-1], put("style", VERSIONS - 1))
    await active.change("base", post("style/deactivate"))
    await gone.change(digests[0], put("gone", 0))
    changing, outcomes = asyncio.Event(), list[Outcome]()

    async def ask_on(number: int) -> None:
        fields = [{"adapter": "style"}, {"adapter": "gone"}, {}, {"adapter": "style", "mode": "merge"}][number % 4]
        turn = 0
        while not changing.is_set():
            name = f"changes-{number}-{turn}"
            body = {"prompt": PROMPT.decode(), "max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            outcomes.append(await client.ask(Ask(name, "/v1/generate", body | fields | {"stream": turn % 2 == 0})))
            turn += 1

    asking = [asyncio.create_task(ask_on(number)) for number in range(8)]
    for turn in range(12):
        version, other = turn % VERSIONS, (turn + 1) % VERSIONS
        await style.change(digests[version], put("style", version))
        await gone.change("deleted", client.http.delete("/v1/adapters/gone"), 204)
        await style.change(digests[other], post("style/rollback", digest=digests[other]))
        mode = "merge" if turn % 3 == 0 else "switch"
        await active.change(digests[other], post("style/activate", mode=mode))
        await gone.change(digests[version], put("gone", version))
        await active.change("base", post("style/deactivate"))
    changing.set()
    await asyncio.gather(*asking)
    histories = {"style": style, "gone": gone, None: active}
    seen: Counter[tuple[str | None, str]] = Counter()
    for outcome in outcomes:
        name = outcome.ask.body.get("adapter")
        possible = histories[name].possible(outcome)
        if outcome.ending is Ending.FAILED:
            assert (name, outcome.code) == ("gone", "adapter_not_found")
            assert "deleted" in possible
        else:
            assert outcome.digest in possible
            assert outcome.texts == (text_of[outcome.digest],)
        seen[name, outcome.digest or "deleted"] += 1
    assert len({digest for name, digest in seen if name == "style"}) > 1, "traffic saw no change"
    for name in ("gone", "style"):
        assert server.http.delete(f"/v1/adapters/{name}").status_code == 204


# --- clients that take nothing --------------------------------------------------------------------


async def test_a_client_that_does_not_read_harms_nobody_and_is_given_up(stage: Stage) -> None:
    limit = ("--request-timeout-s", "10")
    with stage.server(*limit, data="stalled") as server:
        observer = Observer(server.http, server.process.pid)
        before = observer.wait()
        slow = Stalled(server, "slow", tokens=8)
        # The system takes a short answer off the server's hands, but not one of 20 MB.
        stalled = [Stalled(server, "stalled", tokens=8), Stalled(server, "drowned", tokens=2000, n=4)]
        texts = {name: stage.text(name) for name in ADAPTERS}
        for name in ADAPTERS:
            answer = server.generate(PROMPT.decode(), adapter=name, max_new_tokens=TOKENS, ignore_eos=True)
            assert answer["choices"][0]["text"] == texts[name]
        taken = await asyncio.to_thread(slow.read_slowly)
        assert taken.endswith("data: [DONE]\n\n\r\n0\r\n\r\n"), "one byte at a time is an answer too"
        observer.wait(lambda gauges: gauges.open_files <= before.open_files)
        assert server.stop() == 0
        ends = Counter((line["request_id"], line.get("code")) for line in access_log(server))
        assert ends["stalled", None] == ends["slow", None] == 1
        assert ends["drowned", "client_disconnected"] + ends["drowned", "request_timeout"] == 1, ends
        for client in (*stalled, slow):
            client.close()


class Stalled:
    """A client with next to no room for what it is sent, that asks for a long stream."""

    def __init__(self, server: Server, name: str, *, tokens: int, n: int = 1) -> None:
        body = {"prompt": "x", "max_new_tokens": tokens, "n": n, "stream": True, "ignore_eos": True, "logprobs": 20}
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self._socket.settimeout(WAIT_S)
        self._socket.connect(("127.0.0.1", server.port))
        self._socket.sendall(request(json.dumps(body).encode(), name))

    def read_slowly(self) -> str:
        """All of it, one byte at a time."""
        received = bytearray()
        while byte := self._socket.recv(1):
            received += byte
        return received.decode()

    def close(self) -> None:
        self._socket.close()


def request(body: bytes, name: str, path: str = "/v1/generate") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nX-Request-ID: {name}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


# --- signals --------------------------------------------------------------------------------------


async def test_on_sigterm_streams_end_and_new_requests_are_refused(stage: Stage) -> None:
    with stage.server("--drain-timeout-s", f"{2 * WAIT_S}", data="sigterm") as server:
        async with LoadClient(server.url) as client:
            asks = [stream_ask(f"stream-{i}", tokens=400) for i in range(6)]
            running = [asyncio.create_task(client.ask(ask)) for ask in asks]
            await until(lambda: samples(server)["vblora_running_sequences"] == len(asks))
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            late = request(b'{"prompt": "x"}', "late")
            writer.write(late[:-1])
            await until(lambda: server.http.get("/healthz").status_code == 200)  # it has been read as far as it came
            server.process.send_signal(signal.SIGTERM)
            await until(lambda: any("requests have" in line for line in server.log))
            await until(lambda: not accepts(server))
            writer.write(late[-1:])
            answer = (await reader.read()).decode()
            assert answer.startswith("HTTP/1.1 503 ")
            assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "engine_unavailable"
            writer.close()
            outcomes = await asyncio.gather(*running)
        assert by_ending(outcomes) == {"answered": len(asks)}
        assert await asyncio.to_thread(server.process.wait, WAIT_S) == 0


async def test_a_second_sigterm_hurries(stage: Stage) -> None:
    with stage.server(data="hurry") as server:
        async with LoadClient(server.url) as client:
            asks = [stream_ask(f"stream-{i}", tokens=CONTEXT - len(PROMPT)) for i in range(4)]
            running = [asyncio.create_task(client.ask(ask)) for ask in asks]
            await until(lambda: samples(server)["vblora_running_sequences"] == len(asks))
            server.process.send_signal(signal.SIGTERM)
            await until(lambda: any("requests have" in line for line in server.log))
            server.process.send_signal(signal.SIGTERM)
            outcomes = await asyncio.gather(*running)
        assert by_ending(outcomes) == {"internal_error": len(asks)}, "each is told that it fails"
        assert await asyncio.to_thread(server.process.wait, WAIT_S) == 0


def accepts(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port)).close()
    except ConnectionError:
        return False
    return True


def samples(server: Server) -> dict[str, float]:
    lines = [line.split(" ") for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


# --- memory ---------------------------------------------------------------------------------------


async def test_memory_is_flat(client: LoadClient, observer: Observer, server: Server, stage: Stage) -> None:
    """Half a minute of everything: what the last rounds add is little beside what the first ones did."""
    mix = Mix(ADAPTERS, leaving=0.2)

    async def rounds(first: int, last: int) -> Gauges:
        for number in range(first, last):
            await client.run(mix.asks(60, seed=f"memory-{number}"), at_once=2 * (BATCH + QUEUE))
            replaced = parts(stage.folder / f"version-{number % VERSIONS}")
            answer = await client.http.post(
                "/v1/adapters", params={"replace": "true"}, data={"name": "kept"}, files=replaced
            )
            assert answer.status_code == 201
        return observer.wait()

    warm = await rounds(0, 10)
    middle = await rounds(10, 25)
    end = await rounds(25, 40)
    assert end.resident_bytes - middle.resident_bytes < MOST_GROWTH, (warm, middle, end)
    assert server.http.delete("/v1/adapters/kept").status_code == 204


# --- helpers --------------------------------------------------------------------------------------


def stream_ask(name: str, tokens: int) -> Ask:
    body = {"prompt": PROMPT.decode(), "max_new_tokens": tokens, "stream": True, "ignore_eos": True, "adapter": "one"}
    return Ask(name, "/v1/generate", body)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "what was waited for never came"


def access_log(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log if line.startswith("{") and "vblora.access" in line]


def access_lines(server: Server, asks: Sequence[Ask]) -> list[dict[str, Any]]:
    names = {ask.name for ask in asks}
    return [line for line in access_log(server) if line["request_id"] in names]


def prompts(ask: Ask) -> int:
    """How many generations a request asks for."""
    prompt = ask.body.get("prompt")
    return len(prompt) if isinstance(prompt, list) else 1


def choices(ask: Ask) -> int:
    return int(ask.body.get("n", 1)) * prompts(ask)
