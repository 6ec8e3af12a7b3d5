"""POST /v1/embeddings over a real engine: OpenAI's fields, and OpenAI's own client."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from service.settings import Settings, SettingsError
from tests.api.conftest import error_of
from tests.in_process import InProcessServer
from tests.pooling_factory import (
    HeadSpec,
    make_pool_adapter,
    peft_loaded,
    save_pool_model,
    tiny_encoder,
    word_tokenizer,
)
from tests.server import parts

MODEL = tiny_encoder("bert")
WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed")
    save_pool_model(MODEL, "bert", folder / "base")
    for seed, name in enumerate(("one", "two")):
        make_pool_adapter(MODEL, HeadSpec(None, compact=seed == 0, seed=seed), folder / name)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[InProcessServer]:
    with InProcessServer(Settings(model=str(folder / "base"), data_dir=folder / "data", task="embed")) as server:
        for name in ("one", "two"):
            made = server.http.post("/v1/adapters", data={"name": name}, files=parts(folder / name))
            assert made.status_code == 201, made.text
        yield server


def embed(server: InProcessServer, input: Any, **fields: Any) -> httpx.Response:
    return server.http.post("/v1/embeddings", json={"input": input, **fields})


def expected(folder: Path, name: str | None, text: str, pair: str | None = None) -> list[float]:
    loaded = peft_loaded(MODEL, folder / name, None) if name else MODEL
    with torch.inference_mode():
        vector = loaded(**word_tokenizer("bert")(text, pair, return_tensors="pt")).last_hidden_state[0].mean(0)
    numbers: list[float] = (vector / vector.norm()).tolist()
    return numbers


def close(vector: list[float]) -> Any:
    return pytest.approx(vector, abs=2e-6)


def test_as_openai_answers_it(server: InProcessServer, folder: Path) -> None:
    response = embed(server, ["what a day", "x"], model="one")
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["object"], body["model"]) == ("list", "one")
    assert body["usage"] == {"prompt_tokens": 15, "total_tokens": 15}
    assert [(each["object"], each["index"]) for each in body["data"]] == [("embedding", 0), ("embedding", 1)]
    assert body["data"][0]["embedding"] == close(expected(folder, "one", "what a day"))
    assert body["data"][1]["embedding"] == close(expected(folder, "one", "x"))
    assert response.headers["x-adapter-digest"] == server.registry.store.get("", "one").digest


@pytest.mark.parametrize("name", ["one", "two", None])
def test_openais_own_client(server: InProcessServer, folder: Path, name: str | None) -> None:
    """It asks for base64 unasked, and decodes it."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=httpx.Client())
    ids = word_tokenizer("bert")("abc")["input_ids"]
    for input, text in (("hello", "hello"), (["hello"], "hello"), (ids, "abc"), ([ids], "abc")):
        answer = client.embeddings.create(model=name or "base", input=input)
        assert answer.data[0].embedding == close(expected(folder, name, text))


def test_base64_is_float32(server: InProcessServer) -> None:
    (plain,) = embed(server, "x", model="one").json()["data"]
    (packed,) = embed(server, "x", model="one", encoding_format="base64").json()["data"]
    numbers = struct.unpack(f"<{WIDTH}f", base64.b64decode(packed["embedding"]))
    assert list(numbers) == plain["embedding"]


def test_fewer_dimensions_are_scaled_again(server: InProcessServer) -> None:
    (whole,) = embed(server, "x", model="one").json()["data"]
    (cut,) = embed(server, "x", model="one", dimensions=8).json()["data"]
    first = torch.tensor(whole["embedding"][:8])
    assert cut["embedding"] == close((first / first.norm()).tolist())
    error = error_of(embed(server, "x", dimensions=WIDTH + 1), 400, "invalid_request")
    assert error["param"] == "dimensions"


def test_blends_and_pairs(server: InProcessServer, folder: Path) -> None:
    stored = {"name": "both", "adapters": [{"name": "one", "weight": 0.5}, {"name": "two", "weight": 0.4}]}
    assert server.http.post("/v1/blends", json=stored).status_code == 201
    (mixed,) = embed(server, "hello", model="one:0.5+two:0.4").json()["data"]
    (whole,) = embed(server, "hello", model="both").json()["data"]
    assert mixed["embedding"] == close(whole["embedding"])
    assert mixed["embedding"] != close(expected(folder, "one", "hello"))
    (pair,) = embed(server, {"text": "one", "text_pair": "two"}, model="two").json()["data"]
    assert pair["embedding"] == close(expected(folder, "two", "one", "two"))


def test_merged_it_is_the_same(server: InProcessServer, folder: Path) -> None:
    (merged,) = embed(server, "hello", adapter="two", mode="merge").json()["data"]
    assert merged["embedding"] == close(expected(folder, "two", "hello"))
    (other,) = embed(server, "hello", adapter="one").json()["data"]
    assert other["embedding"] == close(expected(folder, "one", "hello"))


def test_what_is_refused(server: InProcessServer) -> None:
    error_of(embed(server, "x", encoding_format="int8"), 400, "invalid_request")
    error_of(embed(server, "x", adapter="nobody"), 404, "adapter_not_found")
    error_of(embed(server, "x" * 100, adapter="one"), 400, "context_length_exceeded")
    error_of(server.http.post("/v1/classify", json={"input": "x"}), 400, "wrong_task")
    error_of(server.http.post("/v1/generate", json={"prompt": "x"}), 400, "wrong_task")


def test_settings_that_are_not_the_tasks(folder: Path, tmp_path: Path) -> None:
    for wrong in ({"pooling": "cls"}, {"normalize": True}, {"task": "classify", "auto_merge": True}):
        with (
            pytest.raises(SettingsError, match="--task"),
            InProcessServer(
                Settings(model=str(folder / "base"), data_dir=tmp_path / "data", **wrong)  # type: ignore[arg-type]
            ),
        ):
            pass
