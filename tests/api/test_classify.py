"""POST /v1/classify over a real engine: inputs, selections, labels, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel

from service.settings import Settings
from tests.api.conftest import error_of
from tests.factories import rewrite
from tests.in_process import InProcessServer
from tests.pooling_factory import (
    CLS,
    CONTEXT,
    SEP,
    VOCABULARY,
    HeadSpec,
    make_pool_adapter,
    peft_scores,
    save_pool_model,
    tiny_classifier,
    with_labels,
    word_tokenizer,
)
from tests.server import parts

MODEL = tiny_classifier("bert", id2label={0: "down", 1: "up"}, label2id={"down": 0, "up": 1})
ADAPTERS = {"two": 2, "other": 2, "three": 3, "five": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    save_pool_model(MODEL, "bert", folder / "base")
    save_pool_model(MODEL.base_model, "bert", folder / "headless")
    for seed, (name, labels) in enumerate(ADAPTERS.items()):
        make_pool_adapter(MODEL, HeadSpec(labels, compact=seed % 2 == 0, seed=seed), folder / name)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[InProcessServer]:
    with InProcessServer(Settings(model=str(folder / "base"), data_dir=folder / "data", task="classify")) as server:
        for name in ADAPTERS:
            assert upload(server, folder / name, name).status_code == 201
        yield server


def upload(server: InProcessServer, adapter: Path, name: str, **files: Any) -> httpx.Response:
    uploaded = {**parts(adapter), **{part: (part, json.dumps(value).encode()) for part, value in files.items()}}
    return server.http.post("/v1/adapters", data={"name": name}, files=uploaded)


def classify(server: InProcessServer, input: Any, **fields: Any) -> httpx.Response:
    return server.http.post("/v1/classify", json={"input": input, **fields})


def data_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    data: list[dict[str, Any]] = response.json()["data"]
    return data


def expected(folder: Path, name: str | None, text: str, pair: str | None = None) -> list[float]:
    """PEFT's probabilities, tokenized as in training."""
    encoded = word_tokenizer("bert")(text, pair, return_tensors="pt")
    types = encoded["token_type_ids"]
    labels = ADAPTERS[name] if name else 2
    path = folder / name if name else None
    logits = peft_scores(MODEL, path, labels, encoded["input_ids"][0].tolist(), token_type_ids=types)
    return logits.softmax(-1).tolist()


def close(probs: list[float]) -> Any:
    return pytest.approx(probs, abs=1e-5)


class TestAnswers:
    def test_one_text_as_vllm_answers_it(self, server: InProcessServer, folder: Path) -> None:
        response = classify(server, "what a day", model="three")
        (answer,) = data_of(response)
        probs = expected(folder, "three", "what a day")
        assert answer == {
            "index": 0,
            "label": f"LABEL_{probs.index(max(probs))}",
            "probs": close(probs),
            "num_classes": 3,
        }
        body = response.json()
        assert body["id"].startswith("classify-")
        assert (body["object"], body["model"]) == ("list", "three")
        assert body["usage"] == {"prompt_tokens": 12, "total_tokens": 12, "completion_tokens": 0}
        assert body["selection"]["adapters"][0]["name"] == "three"
        digest = server.registry.store.get("", "three").digest
        assert response.headers["x-adapter-digest"] == digest

    def test_every_form_of_input(self, server: InProcessServer, folder: Path) -> None:
        ids = word_tokenizer("bert")("abc")["input_ids"]
        inputs = ["first", {"text": "one", "text_pair": "two"}, ids, {"text": "alone"}]
        answers = data_of(classify(server, inputs, adapter="five"))
        wanted = [("first", None), ("one", "two"), ("abc", None), ("alone", None)]
        assert [answer["index"] for answer in answers] == [0, 1, 2, 3]
        for answer, (text, pair) in zip(answers, wanted, strict=True):
            assert answer["probs"] == close(expected(folder, "five", text, pair))
        for alone, text in ((ids, "abc"), ([ids], "abc"), ({"text": "one", "text_pair": "two"}, None)):
            (answer,) = data_of(classify(server, alone, adapter="five"))
            assert answer["probs"] == close(expected(folder, "five", *((text,) if text else ("one", "two"))))

    def test_two_strings_in_a_list_are_two_inputs(self, server: InProcessServer) -> None:
        assert len(data_of(classify(server, ["one", "two"], adapter="two"))) == 2

    def test_everyone_at_once_gets_their_own_head(self, server: InProcessServer, folder: Path) -> None:
        cases = [(name, "text " * length) for length in (1, 4, 9) for name in [*ADAPTERS, None]]
        wanted = {case: expected(folder, *case) for case in cases}

        def ask(case: tuple[str | None, str]) -> list[float]:
            (answer,) = data_of(classify(server, case[1], adapter=case[0] or "base"))
            probs: list[float] = answer["probs"]
            return probs

        with ThreadPoolExecutor(len(cases)) as pool:
            for case, probs in zip(cases * 2, pool.map(ask, cases * 2), strict=True):
                assert probs == close(wanted[case])

    def test_logits_if_they_are_asked_for(self, server: InProcessServer, folder: Path) -> None:
        (answer,) = data_of(classify(server, "x", adapter="three", use_activation=False))
        ids = word_tokenizer("bert")("x")["input_ids"]
        assert answer["probs"] == close(peft_scores(MODEL, folder / "three", 3, ids).tolist())

    def test_the_base_that_has_a_head_of_its_own(self, server: InProcessServer, folder: Path) -> None:
        (answer,) = data_of(classify(server, "hello", adapter="base"))
        probs = expected(folder, None, "hello")
        assert answer["probs"] == close(probs)
        assert answer["label"] == ("down", "up")[probs.index(max(probs))]

    def test_a_blend_of_two_and_stored_it_is_the_same(self, server: InProcessServer) -> None:
        members = [{"name": "two", "weight": 0.6}, {"name": "other", "weight": 0.5}]
        (answer,) = data_of(classify(server, "hello", adapters=members))
        assert [data_of(classify(server, "hello", model="two:0.6+other:0.5"))[0]] == [answer]
        made = server.http.post("/v1/blends", json={"name": "stored", "adapters": members})
        assert made.status_code == 201, made.text
        (stored,) = data_of(classify(server, "hello", model="stored"))
        assert stored["probs"] == close(answer["probs"])
        assert answer["label"] == stored["label"]
        assert answer["label"] in ("down", "up")

    def test_a_stored_blend_of_heads_that_are_not_the_bases_size(self, server: InProcessServer, folder: Path) -> None:
        make_pool_adapter(MODEL, HeadSpec(3, seed=40), folder / "three2")
        assert upload(server, folder / "three2", "three2").status_code == 201
        members = [{"name": "three", "weight": 0.6}, {"name": "three2", "weight": 0.5}]
        (answer,) = data_of(classify(server, "hello", adapters=members))
        assert server.http.post("/v1/blends", json={"name": "stored3", "adapters": members}).status_code == 201
        (stored,) = data_of(classify(server, "hello", model="stored3"))
        assert stored["probs"] == close(answer["probs"])

    def test_the_active_adapter_and_merge(self, server: InProcessServer, folder: Path) -> None:
        assert server.http.post("/v1/adapters/five/activate", json={"mode": "merge"}).status_code == 200
        try:
            response = classify(server, "hello")
            (answer,) = data_of(response)
            assert answer["probs"] == close(expected(folder, "five", "hello"))
            assert response.json()["selection"]["mode"] == "merge"
        finally:
            assert server.http.post("/v1/adapters/five/deactivate").status_code == 200
        (answer,) = data_of(classify(server, "hello", adapter="two"))
        assert answer["probs"] == close(expected(folder, "two", "hello"))


class TestLabels:
    @pytest.mark.parametrize("labels", [["a", "b", "c"], {"0": "a", "1": "b", "2": "c"}])
    def test_the_uploads_own(self, server: InProcessServer, folder: Path, labels: Any) -> None:
        name = f"named-{type(labels).__name__}"
        assert upload(server, folder / "three", name, labels=labels).status_code == 201
        (answer,) = data_of(classify(server, "x", adapter=name))
        assert answer["label"] == "abc"[answer["probs"].index(max(answer["probs"]))]

    def test_the_configs(self, server: InProcessServer, folder: Path, tmp_path: Path) -> None:
        adapter = changed(folder / "three", tmp_path / "a", id2label={"0": "x", "1": "y", "2": "z"})
        assert upload(server, adapter, "configured").status_code == 201
        (answer,) = data_of(classify(server, "x", adapter="configured"))
        assert answer["label"] in ("x", "y", "z")

    def test_the_bases_where_there_are_as_many(self, server: InProcessServer) -> None:
        assert data_of(classify(server, "x", adapter="two"))[0]["label"] in ("down", "up")
        assert data_of(classify(server, "x", adapter="five"))[0]["label"].startswith("LABEL_")

    @pytest.mark.parametrize(
        "labels", [["a", "b"], ["a", 2, "c"], "a", {"0": "a", "2": "c"}, [], ["a" * 2000, "b", "c"]]
    )
    def test_what_cannot_be_labels(self, server: InProcessServer, folder: Path, labels: Any) -> None:
        error_of(upload(server, folder / "three", "bad", labels=labels), 422, "bad_config")

    @pytest.mark.parametrize(
        "labels",
        [
            b'["a", "b", "\\ud800"]',
            b'{"0": "a", "1": "b", "2": "c", "2": "d"}',
            b'["a", "b", NaN]',
            b'\xef\xbb\xbf["a", "b", "c"]',
            b'["a", "b", "\xff"]',
            b"[" * 100_000,
            b"",
        ],
    )
    def test_files_that_cannot_be_read_one_way(self, server: InProcessServer, folder: Path, labels: bytes) -> None:
        """Half a surrogate pair is a Python string like any other, until an answer is to be written."""
        files = {**parts(folder / "three"), "labels": ("labels.json", labels)}
        refused = server.http.post("/v1/adapters", data={"name": "bad"}, files=files)
        assert error_of(refused, 422, "bad_config")["param"] == "labels.json"

    def test_a_problem_type_of_its_own(self, server: InProcessServer, folder: Path, tmp_path: Path) -> None:
        many = changed(folder / "three", tmp_path / "a", problem_type="multi_label_classification")
        assert upload(server, many, "many").status_code == 201
        logits = data_of(classify(server, "x", adapter="many", use_activation=False))[0]["probs"]
        (answer,) = data_of(classify(server, "x", adapter="many"))
        assert answer["probs"] == close(torch.tensor(logits).sigmoid().tolist())
        raw = changed(folder / "three", tmp_path / "b", problem_type="regression")
        assert upload(server, raw, "raw").status_code == 201
        assert data_of(classify(server, "x", adapter="raw"))[0]["probs"] == close(logits)
        bad = changed(folder / "three", tmp_path / "c", problem_type="guess")
        error_of(upload(server, bad, "guess"), 422, "bad_config")

    def test_they_travel_with_an_export(self, server: InProcessServer, folder: Path, tmp_path: Path) -> None:
        assert upload(server, folder / "three", "travels", labels=["a", "b", "c"]).status_code == 201
        for format in ("topk", "logits"):
            archive = server.http.get("/v1/adapters/travels/export", params={"format": format})
            assert archive.status_code == 200, archive.text
            with tarfile.open(fileobj=io.BytesIO(archive.content)) as opened:
                opened.extractall(tmp_path / format, filter="data")
            adapter = tmp_path / format / "travels"
            assert json.loads((adapter / "labels.json").read_text()) == ["a", "b", "c"]
        loaded = PeftModel.from_pretrained(with_labels(MODEL, 3), str(tmp_path / "topk" / "travels")).eval()
        ids = word_tokenizer("bert")("hello", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            probs = loaded(input_ids=ids).logits[0].softmax(-1).tolist()
        assert probs == close(expected(folder, "three", "hello"))


def changed(adapter: Path, to: Path, **config: Any) -> Path:
    to.mkdir()
    for file in adapter.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    values = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return to


class TestLengths:
    def test_too_long_names_the_limit_and_the_input(self, server: InProcessServer) -> None:
        error = error_of(classify(server, ["a", "b" * CONTEXT], adapter="two"), 400, "context_length_exceeded")
        assert "input 1" in error["message"]
        assert f"{CONTEXT + 2}" in error["message"]
        assert f"context is {CONTEXT}" in error["message"]
        assert error["param"] == "input"

    @pytest.mark.parametrize(("limit", "kept"), [(10, 8), (-1, CONTEXT - 2)])
    def test_it_may_be_cut(self, server: InProcessServer, folder: Path, limit: int, kept: int) -> None:
        response = classify(server, "abcdefgh" * CONTEXT, adapter="two", truncate_prompt_tokens=limit)
        (answer,) = data_of(response)
        assert answer["probs"] == close(expected(folder, "two", ("abcdefgh" * CONTEXT)[:kept]))
        assert response.json()["usage"]["prompt_tokens"] == kept + 2

    def test_token_ids_are_cut_as_they_are(self, server: InProcessServer, folder: Path) -> None:
        ids = [CLS, 50, 51, SEP, *range(60, 60 + CONTEXT)]
        (answer,) = data_of(classify(server, ids, adapter="two", truncate_prompt_tokens=4))
        assert answer["probs"] == close(peft_scores(MODEL, folder / "two", 2, ids[:4]).softmax(-1).tolist())

    @pytest.mark.parametrize("limit", [0, CONTEXT + 1, 2])
    def test_limits_that_mean_nothing(self, server: InProcessServer, limit: int) -> None:
        error = error_of(classify(server, "abc", adapter="two", truncate_prompt_tokens=limit), 400, "invalid_request")
        assert error["param"] == "truncate_prompt_tokens"


class TestRefusals:
    def test_blends_of_heads_that_differ(self, server: InProcessServer) -> None:
        error = error_of(classify(server, "x", model="two:0.5+three:0.5"), 400, "invalid_request")
        assert "'two' has 2" in error["message"]
        assert "'three' has 3" in error["message"]
        members = [{"name": "two", "weight": 0.5}, {"name": "three", "weight": 0.5}]
        error_of(server.http.post("/v1/blends", json={"name": "no", "adapters": members}), 400, "invalid_request")

    def test_a_blend_of_nothing(self, server: InProcessServer) -> None:
        error_of(classify(server, "x", model="three:0"), 400, "invalid_request")
        (nothing,) = data_of(classify(server, "x", model="two:0"))
        assert nothing["probs"] == data_of(classify(server, "x", adapter="base"))[0]["probs"]

    def test_the_base_without_a_head(self, folder: Path, tmp_path: Path) -> None:
        settings = Settings(model=str(folder / "headless"), data_dir=tmp_path, task="classify")
        with InProcessServer(settings) as server:
            assert upload(server, folder / "three", "three").status_code == 201
            for fields in ({}, {"adapter": "base"}):
                error = error_of(classify(server, "x", **fields), 400, "invalid_request")
                assert "name an adapter" in error["message"]
            assert data_of(classify(server, "x", adapter="three"))[0]["probs"] == close(expected(folder, "three", "x"))
            headless = make_pool_adapter(MODEL.base_model, HeadSpec(None), tmp_path / "a")
            error_of(upload(server, headless, "none"), 422, "no_target_matched")

    def test_an_adapter_without_a_head_on_a_base_without_one(self, folder: Path, tmp_path: Path) -> None:
        def strip(tensors: dict[str, Any]) -> None:
            for key in [key for key in tensors if "classifier" in key]:
                del tensors[key]

        bare = rewrite(folder / "three", tmp_path / "bare", tensors=strip, config={"modules_to_save": None})
        settings = Settings(model=str(folder / "headless"), data_dir=tmp_path / "data", task="classify")
        with InProcessServer(settings) as server:
            error = error_of(upload(server, bare, "bare"), 422, "missing_tensor")
            assert "classifier" in error["message"]

    def test_half_a_head(self, server: InProcessServer, folder: Path, tmp_path: Path) -> None:
        half = rewrite(folder / "three", tmp_path / "half", tensors={"base_model.model.classifier.bias": None})
        error_of(upload(server, half, "half"), 422, "shape_mismatch")

    @pytest.mark.parametrize("input", [[], [["a", "b"]], "", 7, [1.5], [[-1]], {"text": 3}, [{"text_pair": "x"}], None])
    def test_inputs_that_are_none(self, server: InProcessServer, input: Any) -> None:
        if input == "":
            assert data_of(classify(server, input, adapter="two"))  # its special tokens
            return
        error_of(classify(server, input, adapter="two"), 400, "invalid_request")

    def test_the_rest(self, server: InProcessServer) -> None:
        error_of(classify(server, "x", adapter="unknown"), 404, "adapter_not_found")
        error_of(classify(server, "x", adapter="two", stream=True), 400, "invalid_request")
        for id in (VOCABULARY, 10**30):
            error = error_of(classify(server, ["x", [5, id]], adapter="two"), 400, "invalid_request")
            assert (error["param"], f"input 1 holds the token id {id}" in error["message"]) == ("input", True)
        assert data_of(classify(server, [VOCABULARY - 1], adapter="two"))
        error = error_of(classify(server, ["x"] * 300, adapter="two"), 400, "invalid_request")
        assert "300 inputs" in error["message"]
        assert error["param"] == "input"

    @pytest.mark.parametrize(
        ("route", "body"),
        [
            ("/v1/generate", {"prompt": "x"}),
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/generate", {"inputs": "x"}),
            ("/generate_stream", {"inputs": "x"}),
        ],
    )
    def test_what_this_server_was_not_started_for(self, server: InProcessServer, route: str, body: Any) -> None:
        error = error_of(server.http.post(route, json=body), 400, "wrong_task")
        assert "--task classify" in error["message"]

    def test_metrics_count_them(self, server: InProcessServer) -> None:
        data_of(classify(server, ["x", "y"], adapter="two"))
        metrics = server.http.get("/metrics").text
        assert 'vblora_finished_choices_total{reason="stop"}' in metrics
        assert 'vblora_requests_total{route="/v1/classify",status="200"}' in metrics
