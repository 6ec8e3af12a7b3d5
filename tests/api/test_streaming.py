"""Server-sent events, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from starlette.types import Message

from service.api.sse import EventSourceResponse, data_frame
from service.engine.events import EventSink
from service.engine.sequence import GenerationRequest
from tests.api.asgi import WAIT_S, exchange
from tests.api.conftest import Server
from tests.fakes import Failure, fake_text

pytestmark = pytest.mark.anyio

STREAM = {"prompt": "hi", "stream": True}


def events(text: str) -> list[Any]:
    """The data of every event, parsed; the last one must be [DONE]."""
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: ") for frame in frames[:-1])
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    server.upload("sql")
    response = server.generate(adapter="sql", stream=True, max_new_tokens=20)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-adapter-digest"] == server.digest("sql")
    deltas = events(response.text)
    choices = [delta["choices"][0] for delta in deltas]
    assert "".join(choice["text"] for choice in choices) == fake_text(server.digest("sql"), 20)
    assert [choice["finish_reason"] for choice in choices] == [None] * 19 + ["length"]
    assert len({delta["id"] for delta in deltas}) == 1
    assert all(set(delta) == {"id", "model", "choices"} for delta in deltas[:-1])
    whole = server.generate(adapter="sql", max_new_tokens=20).json()
    for key in ("model", "selection", "usage", "timing"):
        assert deltas[-1][key] == whole[key]


def test_choices_are_told_apart_and_echo_comes_once_for_each(server: Server) -> None:
    deltas = events(server.generate(stream=True, n=2, echo=True, logprobs=0, max_new_tokens=4).text)
    texts, reasons = ["", ""], [None, None]
    for delta in deltas:
        (choice,) = delta["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
        assert len(choice["logprobs"]) == 1
    assert texts == ["hibase", "hibase"]
    assert reasons == ["length", "length"]
    assert ["usage" in delta for delta in deltas] == [False] * 7 + [True]


async def test_deltas_are_sent_as_they_come(server: Server) -> None:
    server.engine.gate.clear()
    async with exchange(server.app, "POST", "/v1/generate", body={**STREAM, "max_new_tokens": 2}) as client:
        server.engine.gate.set()
        assert await client.status() == 200
        assert json.loads((await client.text()).removeprefix("data: "))["choices"][0]["text"] == "b"
        assert json.loads((await client.text()).removeprefix("data: "))["usage"]["completion_tokens"] == 2
        assert await client.text() == "data: [DONE]\n\n"


async def test_a_failure_after_the_first_byte_is_an_error_event(server: Server) -> None:
    server.engine.failure = Failure("request_timeout", "it took too long", after=2)
    async with exchange(server.app, "POST", "/v1/generate", body=STREAM) as client:
        assert await client.status() == 200
        for _ in range(2):
            assert (await client.text()).startswith("data: ")
        error = await client.text()
        assert error.startswith("event: error\ndata: ")
        assert json.loads(error.partition("data: ")[2]) == {
            "error": {
                "message": "it took too long",
                "type": "timeout_error",
                "param": None,
                "code": "request_timeout",
            }
        }
        assert await client.text() == ""  # the end: no [DONE]
    assert server.metrics.errors == {"request_timeout": 1}


async def test_a_bug_after_the_first_byte_is_an_error_event_that_leaks_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("service.api.routes.generate._Writer._last_delta", broken)
    text = server.generate(stream=True, max_new_tokens=3).text
    assert "internal_error" in text
    assert "secret" not in text
    assert "[DONE]" not in text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_while_waiting_cancels_its_request(server: Server, stream: bool) -> None:
    server.engine.gate.clear()
    body = {"prompt": "hi", "stream": stream}
    async with exchange(server.app, "POST", "/v1/generate", body=body) as client:
        await asyncio.to_thread(server.engine.submitted.wait, WAIT_S)
        client.leave()
        await client.end()
    assert server.engine.cancelled.is_set()
    assert server.metrics.requests == {("/v1/generate", 499): 1}


async def test_a_client_that_leaves_in_the_middle_of_a_stream_cancels_it(server: Server) -> None:
    server.engine.hold_after = 1
    async with exchange(server.app, "POST", "/v1/generate", body=STREAM) as client:
        assert await client.status() == 200
        await client.text()
        assert not server.engine.cancelled.is_set()
        client.leave()
        await client.end()
    assert server.engine.cancelled.is_set()


async def test_a_stream_whose_client_cannot_be_reached_is_cancelled(server: Server) -> None:
    """Some servers say that the client has gone by an OSError from `send`."""
    async with exchange(server.app, "POST", "/v1/generate", body=STREAM) as client:
        client.unreachable = True
        await client.end()
    assert server.engine.cancelled.is_set()


async def test_a_request_that_ended_is_not_cancelled(server: Server) -> None:
    for stream in (True, False):
        async with exchange(server.app, "POST", "/v1/generate", body={"prompt": "hi", "stream": stream}) as client:
            await client.end()
            assert await client.status() == 200
    assert not server.engine.cancelled.is_set()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_cancelled_as_soon_as_it_is_accepted_is_given_up(server: Server, stream: bool) -> None:
    submit = server.engine.submit

    def accept_and_cancel(requests: Sequence[GenerationRequest], sink: EventSink) -> None:
        submit(requests, sink)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    server.engine.submit = accept_and_cancel  # type: ignore[method-assign]
    server.engine.gate.clear()
    async with exchange(server.app, "POST", "/v1/generate", body={"prompt": "hi", "stream": stream}) as own:
        await own.end()
    assert server.engine.cancelled.is_set()


async def test_events_after_the_loop_has_closed_are_dropped(server: Server) -> None:
    """The engine may outlive the web server by a moment."""
    from service.api.generation import EventStream
    from service.api.observation import Observation
    from service.engine.events import FailedEvent
    from service.engine.selection import Selection
    from service.engine.sequence import GenerationRequest, SamplingParams

    loop = asyncio.new_event_loop()
    server.engine.gate.clear()

    async def submit() -> EventStream:
        request = GenerationRequest("id", (1,), SamplingParams(), Selection())
        observation = Observation("id", [request], server.metrics, server.state.activity, stream=True)
        return EventStream(server.engine, [request], observation)

    stream = await asyncio.to_thread(loop.run_until_complete, submit())
    loop.close()
    stream._deliver(FailedEvent("id", "internal_error", "stopped"))


async def test_a_backlog_of_events_holds_up_neither_others_nor_the_news_that_the_client_has_left() -> None:
    """What is there already is sent without waiting for anything; between two frames the event loop gets its turn."""
    sent: list[Message] = []
    turns = 0

    async def backlog() -> AsyncGenerator[str, None]:
        for i in range(1000):
            yield data_frame(f"{i}")

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        nonlocal turns
        while len(sent) < 10:
            turns += 1
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    closed: list[bool] = []
    response = EventSourceResponse(backlog(), headers={}, on_close=lambda: closed.append(True))
    scope: dict[str, Any] = {"type": "http"}
    await response(scope, receive, send)
    assert turns >= 5
    assert len(sent) < 20
    assert closed == [True]
    assert scope["state"]["error_code"] == "client_disconnected"
