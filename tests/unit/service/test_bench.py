"""`vblora-serve bench` against a server of every habit: what counts as answered, and what is said of the rest."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from service.cli import main
from service.commands.bench_answers import AnswerFailed, Dialect, StreamReader, read_answer
from service.commands.bench_client import BenchClient, Manner, Outcome
from service.commands.bench_figures import Latency, quantile
from service.commands.bench_plan import Ask, Popularity, arrivals, deal, random_prompts
from tests.api.listening import listening

KEY = "bench-key"
TOKENS = 3


class Habits:
    """A server that does to each request what its adapter's name says. `asked` has every body in turn."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.key: str | None = None
        self.at_once = self.most_at_once = 0
        self.app = FastAPI()
        self.app.get("/v1/adapters")(self.adapters)
        self.app.get("/v1/models")(self.models)
        self.app.post("/tokenize")(self.tokenize)
        self.app.post("/v1/generate")(self.generate)
        self.app.post("/v1/completions")(self.completions)

    async def adapters(self, request: Request, after: str | None = None) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"code": "unauthorized", "message": "no key"}}, 401)
        names, following = (["sql"], "sql") if after is None else (["style"], None)
        return JSONResponse({"data": [{"name": name} for name in names], "next": following})

    async def models(self) -> dict[str, Any]:
        return {"data": [{"id": "org/model"}]}

    async def tokenize(self, request: Request) -> dict[str, Any]:
        return {"tokens": [5, 6, 7, 6]}

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        frames = [{"choices": [{"token_ids": [i], "text": "a", "finish_reason": None}]} for i in range(TOKENS - 1)]
        frames.append({"choices": [{"token_ids": [9], "text": "b", "finish_reason": "length"}]})
        frames[-1]["usage"] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": TOKENS}
        events = [f"data: {json.dumps(frame)}\n\n" for frame in frames]
        return await self._habit(body["adapter"], [*events, "data: [DONE]\n\n"])

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        frames: list[dict[str, Any]] = [
            {"choices": [{"text": "a", "finish_reason": None}]},
            {"choices": [{"text": "b", "finish_reason": "length"}]},
            {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 5}},
        ]
        return await self._habit(
            body["model"], [*(f"data: {json.dumps(f)}\r\n\r\n" for f in frames), "data: [DONE]\n\n"]
        )

    async def _habit(self, name: str, events: list[str]) -> Response:
        error = {"error": {"code": "overloaded", "message": "the queue is full"}}
        match name:
            case "busy":
                return JSONResponse(error, 429, {"retry-after": "0"})
            case "busy-once" if len([body for body in self.asked if body["adapter"] == name]) == 1:
                return JSONResponse(error, 429, {"retry-after": "0"})
            case "missing":
                return JSONResponse({"error": {"code": "adapter_not_found", "message": "none such"}}, 404)
            case "broken":
                return PlainTextResponse("oh", 500)
            case "cut":
                events = events[:-1]
            case "unfinished":
                events = [*events[:-2], events[-1]]
            case "error-inside":
                events = [events[0], "event: error\ndata: " + json.dumps(error) + "\n\n"]
            case "plain-error":
                events = [events[0], "data: " + json.dumps(error) + "\n\n", *events[1:]]
            case "aborted":
                events = [event.replace('"length"', '"abort"') for event in events]
            case "nonsense":
                events = ["data: {oh\n\n", *events]
            case "held":
                await asyncio.Event().wait()
            case "interrupt":
                main_thread = threading.main_thread().ident
                assert main_thread is not None
                signal.pthread_kill(main_thread, signal.SIGINT)  # to the process, this thread may get it
                await asyncio.Event().wait()
        return StreamingResponse(self._send(events), media_type="text/event-stream")

    async def _send(self, events: list[str]) -> AsyncIterator[str]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        for event in events:
            yield event
            await asyncio.sleep(0)
        self.at_once -= 1


@pytest.fixture
def habits() -> Habits:
    return Habits()


@pytest.fixture
def url(habits: Habits) -> Iterator[str]:
    with listening(habits.app) as port:
        yield f"http://127.0.0.1:{port}"


Bench = Callable[..., tuple[int, Any]]


@pytest.fixture
def bench(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs the command with --json -: (exit code, what it printed; of an error, the message)."""
    monkeypatch.delenv("VBLORA_API_KEY", raising=False)

    def run(*words: object) -> tuple[int, Any]:
        code = main(["bench", url, "--json", "-", *map(str, words)])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else err

    return run


def of(*names: str) -> list[str]:
    return [word for name in names for word in ("--adapter", name)]


class TestWhatCounts:
    def test_answers(self, bench: Bench, habits: Habits) -> None:
        code, found = bench("--requests", 6, "--prompt-tokens", 4, "--max-new-tokens", TOKENS)
        assert code == 0
        assert (found["ok"], found["failed"], found["refused"], found["unfinished"]) == (6, 0, 0, 0)
        assert (found["input_tokens"], found["output_tokens"]) == (24, 18)
        assert {name: each["ok"] for name, each in found["adapters"].items()} == {"base": 2, "sql": 2, "style": 2}
        assert 0 < found["first_token_ms"]["p50"] <= found["end_to_end_ms"]["p50"]
        assert found["requests_per_s"] == pytest.approx(6 / found["duration_s"], rel=0.01)
        for body in habits.asked:
            assert (body["temperature"], body["stream"], body["ignore_eos"], body["max_new_tokens"]) == (
                0,
                True,
                True,
                3,
            )
            assert len(body["prompt"]) == 4
            assert set(body["prompt"]) <= {5, 6, 7}

    @pytest.mark.parametrize(
        ("habit", "code"),
        [
            ("missing", "adapter_not_found"),
            ("broken", "http_500"),
            ("cut", "truncated"),
            ("unfinished", "truncated"),
            ("error-inside", "overloaded"),
            ("plain-error", "overloaded"),
            ("aborted", "finish_abort"),
            ("nonsense", "invalid_event"),
        ],
    )
    def test_what_is_no_answer(self, bench: Bench, habit: str, code: str) -> None:
        exit_code, found = bench("--requests", 4, *of(habit, "sql"))
        assert exit_code == 1
        assert (found["ok"], found["failed"], found["refused"]) == (2, 2, 0)
        assert found["by_code"] == {code: 2}
        assert found["output_tokens"] == 2 * TOKENS
        assert found["adapters"][habit]["end_to_end_ms"]["mean"] is None

    def test_a_timeout(self, bench: Bench) -> None:
        exit_code, found = bench("--requests", 1, *of("held"), "--timeout", 0.2)
        assert (exit_code, found["by_code"]) == (1, {"timeout": 1})

    def test_refusals(self, bench: Bench, habits: Habits) -> None:
        exit_code, found = bench("--requests", 3, *of("busy"), "--rate", 1000)
        assert (exit_code, found["ok"], found["failed"], found["refused"]) == (1, 0, 0, 3)
        assert found["by_code"] == {"overloaded": 3}
        assert len(habits.asked) == 3

    def test_refusals_are_asked_again(self, bench: Bench, habits: Habits) -> None:
        exit_code, found = bench("--requests", 3, *of("busy-once"), "--concurrency", 1, "--retry")
        assert (exit_code, found["ok"], found["refused"], found["retries"]) == (0, 3, 0, 1)
        assert len(habits.asked) == 4

    def test_one_that_stays_busy_times_out(self, bench: Bench) -> None:
        exit_code, found = bench("--requests", 1, *of("busy"), "--retry", "--timeout", 0.2)
        assert (exit_code, found["by_code"]) == (1, {"timeout": 1})

    def test_other_servers(self, bench: Bench, habits: Habits) -> None:
        exit_code, found = bench("--requests", 2, "--api", "openai", "--no-ignore-eos")
        assert exit_code == 0
        assert (found["input_tokens"], found["output_tokens"]) == (8, 10), "as the server counts"
        assert [body["model"] for body in habits.asked] == ["org/model"] * 2
        assert not any("ignore_eos" in body for body in habits.asked)

    def test_ctrl_c(self, bench: Bench) -> None:
        exit_code, found = bench("--requests", 9, *of("sql", "style", "interrupt"), "--concurrency", 1)
        assert exit_code == 130
        assert (found["interrupted"], found["ok"], found["failed"], found["unfinished"]) == (True, 2, 0, 1)


class TestLoad:
    def test_a_closed_loop_has_so_many_clients(self, bench: Bench, habits: Habits) -> None:
        assert bench("--requests", 12, *of("sql"), "--concurrency", 3, "--warmup", 2)[1]["ok"] == 12
        assert habits.most_at_once <= 3
        assert len(habits.asked) == 14
        prompts = {tuple(body["prompt"]) for body in habits.asked}
        assert len(prompts) == 14, "none of them twice"

    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("p.txt", "one\n\ntwo\n", ["one", "two", "one"]),
            ("p.jsonl", '"one"\n{"prompt": [1, 2]}\n', ["one", [1, 2], "one"]),
        ],
    )
    def test_prompts_of_a_file(
        self, bench: Bench, habits: Habits, tmp_path: Path, name: str, text: str, expected: list[Any]
    ) -> None:
        (tmp_path / name).write_text(text)
        assert bench("--requests", 3, *of("sql"), "--prompt-file", tmp_path / name, "--concurrency", 1)[0] == 0
        assert [body["prompt"] for body in habits.asked] == expected

    def test_a_line_of_the_file_that_is_no_prompt(self, bench: Bench, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text('"one"\n{"text": "two"}\n')
        code, error = bench("--prompt-file", tmp_path / "p.jsonl")
        assert code == 2
        assert "line 2 of" in error

    def test_a_seed_decides(self) -> None:
        names = ["a", "b", "c"]
        assert deal(names, 4, Popularity.ROUND_ROBIN, 0) == ["a", "b", "c", "a"]
        zipf = Counter(deal(names, 6000, Popularity.ZIPF, 0))
        assert zipf["a"] / zipf["c"] == pytest.approx(3, rel=0.15)
        assert deal(names, 50, Popularity.ZIPF, 1) == deal(names, 50, Popularity.ZIPF, 1)
        assert deal(names, 50, Popularity.ZIPF, 1) != deal(names, 50, Popularity.ZIPF, 2)
        assert list(random_prompts(3, 8, [], 1)) == list(random_prompts(3, 8, [], 1))
        assert arrivals(4000, 2.0, 0)[-1] == pytest.approx(2000, rel=0.1)


class TestServers:
    def test_a_key(self, bench: Bench, habits: Habits, monkeypatch: pytest.MonkeyPatch) -> None:
        habits.key = KEY
        code, error = bench()
        assert code == 1
        assert "answers 401 (unauthorized): no key; give a key with --api-key-file or VBLORA_API_KEY" in error
        monkeypatch.setenv("VBLORA_API_KEY", KEY)
        assert bench("--requests", 1)[0] == 0

    def test_another_kind_of_server(self, capsys: pytest.CaptureFixture[str]) -> None:
        with listening(FastAPI()) as port:
            assert main(["bench", f"http://127.0.0.1:{port}"]) == 1
        assert "is it a vblora-serve? Give --api openai for other servers" in capsys.readouterr().err


class TestOutput:
    def test_people_are_told(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", url, "--requests", "4", *of("sql", "missing")]) == 1
        out, err = capsys.readouterr()
        assert err == ""
        assert "answered" in out
        assert "2 × adapter_not_found: none such" in out
        assert "\x1b" not in out
        assert all(line == line.rstrip() for line in out.splitlines())

    def test_lines_of_a_file(self, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for _ in range(2):
            assert main(["bench", url, "--requests", "1", "--json", str(tmp_path / "f.jsonl")]) == 0
        assert "answered" in capsys.readouterr().out
        assert [json.loads(line)["ok"] for line in (tmp_path / "f.jsonl").read_text().splitlines()] == [1, 1]

    def test_latencies(self) -> None:
        assert Latency.of([]) == Latency(None, None, None, None)
        assert Latency.of([0.001, 0.003]) == Latency(2.0, 3.0, 3.0, 3.0)
        assert quantile(range(100), 0.95) == 95


def _stream(**fields: Any) -> list[tuple[float, bytes, bytes]]:
    choice = {"text": "a", "token_ids": [1], "finish_reason": "stop"}
    frame = {"choices": [choice], "usage": {"prompt_tokens": 2, "completion_tokens": 1}, **fields}
    return [(0.0, b"", json.dumps(frame).encode()), (0.0, b"", b"[DONE]")]


class TestNonsense:
    """What no server should say ends one request, and not the measurement."""

    @pytest.mark.parametrize("choices", [5, {"a": 1}, [7], [{"token_ids": 7, "finish_reason": None}], [{}]])
    def test_choices(self, choices: object) -> None:
        with pytest.raises(AnswerFailed, match="broke off after 0 tokens"):
            read_answer(_stream(choices=choices), Dialect.NATIVE)

    def test_a_reason_of_another_type(self) -> None:
        choice = {"token_ids": [1, 2], "finish_reason": ["stop"]}
        assert read_answer(_stream(choices=[choice]), Dialect.NATIVE).times == (0.0, 0.0)

    @pytest.mark.parametrize("count", ["many", [1], -3, 2.5, True, None])
    def test_counts(self, count: object) -> None:
        usage = {"prompt_tokens": count, "completion_tokens": count}
        answer = read_answer(_stream(usage=usage), Dialect.NATIVE)
        assert (answer.input_tokens, answer.output_tokens) == (0, 1)

    def test_brackets_without_end(self) -> None:
        with pytest.raises(AnswerFailed, match="no JSON object"):
            read_answer([(0.0, b"", b"[" * 200_000)], Dialect.NATIVE)

    @pytest.mark.parametrize("page", [{"x": 1}, {"data": None}, {"data": [1]}, {"data": [{}]}])
    def test_lists_that_are_none(self, page: object, capsys: pytest.CaptureFixture[str]) -> None:
        app = FastAPI()
        app.get("/v1/adapters")(lambda: page)
        app.get("/v1/models")(lambda: page)
        with listening(app) as port:
            for options in [], ["--api", "openai"]:
                assert main(["bench", f"http://127.0.0.1:{port}", *options]) == 1
                error = capsys.readouterr().err
                assert "does not list what it serves: is it" in error
                assert "bug" not in error

    def test_a_list_without_end(self, capsys: pytest.CaptureFixture[str]) -> None:
        app, habits = FastAPI(), Habits()
        app.get("/v1/adapters")(lambda: {"data": [{"name": "sql"}], "next": "sql"})
        app.post("/v1/generate")(habits.generate)
        with listening(app) as port:
            assert main(["bench", f"http://127.0.0.1:{port}", "--requests", "2"]) == 0
        assert [body["adapter"] for body in habits.asked] == ["base", "sql"]

    def test_a_refusal_until_next_year(self) -> None:
        def refuse(request: httpx.Request) -> httpx.Response:
            return httpx.Response(429, headers={"Retry-After": "9" * 400})

        async def asked() -> Outcome:
            manner = Manner(Dialect.NATIVE, 5.0, retry=False, ignore_eos=True)
            async with BenchClient("http://test", None, manner, httpx.MockTransport(refuse)) as client:
                return await client.ask(Ask("base", "hi", 1))

        assert asyncio.run(asked()).retry_after_s == 60


def test_events_in_pieces() -> None:
    """However the bytes are cut, and whatever Unicode calls a line's end."""
    frame = {"choices": [{"text": "a\u2028b", "finish_reason": "stop"}]}
    stream = f": hello\nevent: x\ndata:{json.dumps(frame, ensure_ascii=False)}\n\ndata: [DONE]\n\n".encode()
    clock = iter(range(1000))
    reader = StreamReader(lambda: float(next(clock)))
    for byte in stream:
        reader.feed(bytes([byte]))
    answer = read_answer(reader.events, Dialect.OPENAI)
    assert len(answer.times) == answer.output_tokens == 1
    with pytest.raises(AnswerFailed, match="broke off after 1 tokens"):
        read_answer(reader.events[:-1], Dialect.OPENAI)
