"""Encoder-decoders over HTTP and a real engine: the doors for text, what they answer, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from service.settings import Settings
from tests.api.conftest import error_of
from tests.factories import EOS_ID
from tests.in_process import InProcessServer
from tests.seq2seq_factory import (
    CONTEXT,
    Seq2SeqSpec,
    blended,
    ending_tokenizer,
    make_seq2seq_adapter,
    peft_generated,
    peft_loaded,
    save_seq2seq,
    shared_model,
)
from tests.server import parts

MODEL = shared_model("bart")
ADAPTERS = ["one", "two", "three", "four"]
TEXT = "It rained all day."
TOKENIZER = ending_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seq2seq")
    save_seq2seq(MODEL, folder / "base")
    for seed, name in enumerate(ADAPTERS):
        make_seq2seq_adapter(MODEL, Seq2SeqSpec(compact=seed % 2 == 0, seed=seed), folder / name)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[InProcessServer]:
    settings = Settings(model=str(folder / "base"), data_dir=folder / "data", task="seq2seq", max_queue=40)
    with InProcessServer(settings) as server:
        for name in ADAPTERS:
            uploaded = server.http.post("/v1/adapters", data={"name": name}, files=parts(folder / name))
            assert uploaded.status_code == 201, uploaded.text
        yield server


def expected(folder: Path, name: str | None, text: str, tokens: int = 12, **options: Any) -> list[int]:
    loaded = peft_loaded(MODEL, folder / name if name else None)
    return peft_generated(loaded, TOKENIZER(text)["input_ids"], tokens, **options)


def text_of(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def generate(server: InProcessServer, **fields: Any) -> httpx.Response:
    return server.http.post("/v1/generate", json={"prompt": TEXT, "temperature": 0, "max_new_tokens": 12, **fields})


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    frames = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame) for frame in frames[:-1]]


class TestAnswers:
    def test_the_output_stands_alone(self, server: InProcessServer, folder: Path) -> None:
        answer = generate(server, adapter="one").json()
        ids = expected(folder, "one", TEXT)
        (choice,) = answer["choices"]
        assert (choice["token_ids"], choice["text"]) == (ids, text_of(ids))
        assert answer["usage"] == {"prompt_tokens": 19, "completion_tokens": 12, "total_tokens": 31}
        assert answer["selection"]["adapters"][0]["name"] == "one"

    def test_blends_the_base_and_the_active_adapter(self, server: InProcessServer, folder: Path) -> None:
        assert generate(server).json()["choices"][0]["token_ids"] == expected(folder, None, TEXT)
        parts = [{"name": "one", "weight": 0.7}, {"name": "four", "weight": 0.4}]
        summed = blended(MODEL, {folder / "one": 0.7, folder / "four": 0.4})
        ids = peft_generated(summed, TOKENIZER(TEXT)["input_ids"], 12)
        assert generate(server, adapters=parts).json()["choices"][0]["token_ids"] == ids
        assert server.http.post("/v1/adapters/two/activate").status_code == 200
        assert generate(server).json()["choices"][0]["token_ids"] == expected(folder, "two", TEXT)
        assert generate(server, adapter="base").json()["choices"][0]["token_ids"] == expected(folder, None, TEXT)
        assert server.http.post("/v1/adapters/two/deactivate").status_code == 200

    def test_merged_it_is_the_same_and_says_so(self, server: InProcessServer, folder: Path) -> None:
        activated = server.http.post("/v1/adapters/three/activate", json={"mode": "merge"})
        assert activated.json()["merge_error"] < 1e-4
        answer = generate(server).json()
        assert answer["selection"]["mode"] == "merge"
        assert answer["choices"][0]["token_ids"] == expected(folder, "three", TEXT)
        assert server.http.post("/v1/adapters/three/deactivate").status_code == 200

    def test_everyone_at_once_gets_their_own(self, server: InProcessServer, folder: Path) -> None:
        cases = [(name, "text " * length) for length in (1, 4, 9) for name in [*ADAPTERS, None]]
        wanted = {case: expected(folder, *case) for case in cases}

        def ask(case: tuple[str | None, str]) -> list[int]:
            answer = generate(server, prompt=case[1], adapter=case[0] or "base")
            ids: list[int] = answer.json()["choices"][0]["token_ids"]
            return ids

        with ThreadPoolExecutor(len(cases)) as pool:
            for case, ids in zip(cases * 2, pool.map(ask, cases * 2), strict=True):
                assert ids == wanted[case]

    def test_a_stream_comes_to_the_same(self, server: InProcessServer, folder: Path) -> None:
        events = events_of(generate(server, adapter="two", stream=True))
        choices = [choice for event in events for choice in event["choices"]]
        ids = expected(folder, "two", TEXT)
        assert [token for choice in choices for token in choice["token_ids"]] == ids
        assert "".join(choice["text"] for choice in choices) == text_of(ids)
        assert len(events) == len(ids)
        assert (choices[-1]["finish_reason"], events[-1]["usage"]["completion_tokens"]) == ("length", 12)

    def test_log_probabilities_are_of_the_output(self, server: InProcessServer, folder: Path) -> None:
        (choice,) = generate(server, adapter="one", logprobs=2).json()["choices"]
        ids = expected(folder, "one", TEXT)
        loaded = peft_loaded(MODEL, folder / "one")
        with torch.inference_mode():
            decoder_ids = torch.tensor([[EOS_ID, *ids[:-1]]])
            prompt = torch.tensor([TOKENIZER(TEXT)["input_ids"]])
            logits = loaded(input_ids=prompt, decoder_input_ids=decoder_ids, use_cache=False).logits[0]
        likely = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        assert [each["logprob"] for each in choice["logprobs"]] == pytest.approx(likely, abs=1e-4)
        assert all(len(each["top"]) == 2 for each in choice["logprobs"])

    def test_stop_strings_choices_and_seeds(self, server: InProcessServer, folder: Path) -> None:
        fields = {"adapter": "one", "temperature": 1.3, "seed": 3, "n": 3}
        choices = generate(server, **fields).json()["choices"]
        assert len({choice["text"] for choice in choices}) == 3
        assert generate(server, **fields).json()["choices"] == choices
        stop = next(text[2:4] for choice in choices if len(text := choice["text"]) > 6 and text[2:4] not in text[:3])
        stopped = generate(server, **fields, stop=stop).json()["choices"]
        for before, after in zip(choices, stopped, strict=True):
            assert after["text"] == before["text"].partition(stop)[0]
            assert (after["finish_reason"] == "stop") >= (stop in before["text"])

    def test_openais_route(self, server: InProcessServer, folder: Path) -> None:
        body = {
            "model": "one:0.7+four:0.4",
            "prompt": [TEXT, "short"],
            "temperature": 0,
            "max_tokens": 12,
            "logprobs": 1,
        }
        answer = server.http.post("/v1/completions", json=body).json()
        summed = blended(MODEL, {folder / "one": 0.7, folder / "four": 0.4})
        for choice, text in zip(answer["choices"], [TEXT, "short"], strict=True):
            ids = peft_generated(summed, TOKENIZER(text)["input_ids"], 12)
            assert choice["text"] == text_of(ids)
            assert len(choice["logprobs"]["token_logprobs"]) == len(ids)
        streamed = server.http.post("/v1/completions", json={**body, "model": "two", "prompt": TEXT, "stream": True})
        text = "".join(choice["text"] for event in events_of(streamed) for choice in event["choices"])
        assert text == text_of(expected(folder, "two", TEXT))

    def test_a_schema_is_followed(self, server: InProcessServer) -> None:
        shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["yes", "no"]}}}
        body = {"model": "one", "prompt": TEXT, "temperature": 0, "max_tokens": 12, "response_format": shape}
        answer = server.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert json.loads(answer.json()["choices"][0]["text"]) in ("yes", "no")

    def test_what_it_is_made_of(self, server: InProcessServer, folder: Path) -> None:
        version = server.http.get("/version").json()
        assert (version["task"], version["kv_backend"], version["model_type"]) == ("seq2seq", "encoder-decoder", "bart")
        metrics = server.http.get("/metrics").text
        assert "vblora_prompt_tokens_total" in metrics
        config = json.loads((folder / "one" / "adapter_config.json").read_text())
        counted = server.http.get("/v1/adapters/one/parameters").json()
        estimated = server.http.post("/v1/parameters/estimate", json={"config": config})
        assert estimated.json()["total_params"] == counted["total_params"]

    def test_a_stored_blend_is_served(self, server: InProcessServer, folder: Path) -> None:
        members = [{"name": "one", "weight": 0.7}, {"name": "four", "weight": 0.4}]
        made = server.http.post("/v1/blends", json={"name": "stored", "adapters": members})
        assert made.status_code == 201, made.text
        beside = generate(server, adapters=members).json()["choices"][0]
        assert generate(server, adapter="stored").json()["choices"][0]["token_ids"] == beside["token_ids"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("route", "body"),
        [
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
            ("/generate", {"inputs": "hello"}),
            ("/generate_stream", {"inputs": "hello"}),
        ],
    )
    def test_routes_that_continue_texts(self, server: InProcessServer, route: str, body: dict[str, Any]) -> None:
        error = error_of(server.http.post(route, json=body), 400, "wrong_task")
        assert "/v1/generate and /v1/completions" in error["message"]
        assert "--task generate" in error["message"]

    @pytest.mark.parametrize(("route", "task"), [("/v1/classify", "classify"), ("/v1/embeddings", "embed")])
    def test_routes_of_other_tasks(self, server: InProcessServer, route: str, task: str) -> None:
        error = error_of(server.http.post(route, json={"input": "hello"}), 400, "wrong_task")
        assert f"--task {task}" in error["message"]

    @pytest.mark.parametrize("field", ["echo", "receipt"])
    @pytest.mark.parametrize("route", ["/v1/generate", "/v1/completions"])
    def test_what_needs_the_prompt_before_the_output(self, server: InProcessServer, route: str, field: str) -> None:
        response = server.http.post(route, json={"prompt": TEXT, field: True})
        assert error_of(response, 400, "invalid_request")["param"] == field

    def test_lengths_of_each_side(self, server: InProcessServer) -> None:
        error = error_of(generate(server, prompt=[1] * (CONTEXT + 1)), 400, "context_length_exceeded")
        assert error["param"] == "prompt"
        assert f"the encoder reads at most {CONTEXT} tokens" in error["message"]
        error = error_of(generate(server, max_new_tokens=CONTEXT + 1), 400, "context_length_exceeded")
        assert error["param"] == "max_new_tokens"
        body = {"prompt": TEXT, "max_tokens": CONTEXT + 1}
        error = error_of(server.http.post("/v1/completions", json=body), 400, "context_length_exceeded")
        assert error["param"] == "max_tokens"
        assert f"max_tokens is {CONTEXT + 1}" in error["message"]

    def test_an_adapter_of_another_base(self, server: InProcessServer, tmp_path: Path) -> None:
        path = make_seq2seq_adapter(shared_model("t5"), Seq2SeqSpec(seed=1), tmp_path / "t5")
        response = server.http.post("/v1/adapters", data={"name": "t5"}, files=parts(path))
        error_of(response, 422, "no_target_matched")

    def test_unknown_adapters_and_token_ids(self, server: InProcessServer) -> None:
        error_of(generate(server, adapter="nobody"), 404, "adapter_not_found")
        error_of(generate(server, prompt=[100_000]), 400, "invalid_request")


class TestUnderLoad:
    def test_a_full_queue_refuses_and_the_others_are_answered(self, folder: Path, tmp_path: Path) -> None:
        settings = Settings(
            model=str(folder / "base"), data_dir=tmp_path, task="seq2seq", max_queue=2, max_batch_size=1
        )
        with InProcessServer(settings) as server:
            runner: Any = server.runner
            read, entered, opened = runner._read, threading.Event(), threading.Event()

            def gated(rows: Any, prompts: Any) -> Any:
                entered.set()
                assert opened.wait(20)
                return read(rows, prompts)

            runner._read = gated
            with ThreadPoolExecutor(4) as pool:
                first = pool.submit(generate, server)
                assert entered.wait(20)
                late = pool.submit(generate, server, timeout_s=1e-6, prompt="late")
                other = pool.submit(generate, server, prompt="other")
                while server.engine.stats().waiting < 2:
                    entered.wait(0.01)
                error_of(generate(server), 429, "overloaded")
                opened.set()
                assert first.result().status_code == 200
                error_of(late.result(), 408, "request_timeout")
                assert other.result().json()["choices"][0]["token_ids"] == expected(folder, None, "other")

    def test_a_client_that_leaves_is_forgotten(self, server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """No step is taken after the first token until the server has noticed."""
        left, runner, cancel = threading.Event(), server.runner, server.engine.cancel
        decode = runner._decode  # type: ignore[attr-defined]

        def noted(request_id: str) -> None:
            cancel(request_id)
            left.set()

        def held(rows: Any, tokens: Any) -> Any:
            assert left.wait(20)
            return decode(rows, tokens)

        monkeypatch.setattr(server.engine, "cancel", noted)
        monkeypatch.setattr(runner, "_decode", held)
        before = self.cancelled(server)
        body = {"prompt": TEXT, "adapter": "one", "max_new_tokens": 90, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/generate", json=body) as response:
            next(response.iter_lines())
        pause = threading.Event()
        while (stats := server.engine.stats()).running or stats.kv_bytes:
            pause.wait(0.01)
        assert left.is_set()
        assert self.cancelled(server) == before + 1
        assert generate(server).status_code == 200

    def cancelled(self, server: InProcessServer) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        name = 'vblora_finished_choices_total{reason="cancelled"} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))
