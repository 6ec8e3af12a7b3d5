"""A classifier and an encoder whose bases are quantized, as servers: answers, what they say of themselves, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import Settings
from tests.api.conftest import error_of
from tests.in_process import InProcessServer
from tests.pooling_factory import HeadSpec, make_pool_adapter, save_pool_model, tiny_classifier
from tests.server import parts

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_quantized_classifier(how: str, tmp_path: Path) -> None:
    model = tiny_classifier("roberta")
    save_pool_model(model, "roberta", tmp_path / "base")
    settings = Settings(model=str(tmp_path / "base"), data_dir=tmp_path / "data", task="classify", quantization=how)
    with InProcessServer(settings) as server:
        for labels in (2, 5):
            adapter = make_pool_adapter(model, HeadSpec(labels, seed=labels), tmp_path / f"of{labels}")
            form = {"data": {"name": f"of{labels}"}, "files": parts(adapter)}
            assert server.http.post("/v1/adapters", **form).status_code == 201
        versions = server.http.get("/version").json()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert versions["quantization"] == how
        assert versions["weight_bytes"] < 3 * parameters
        assert server.http.get("/v1/parameters").json()["base"]["total_params"] == parameters
        for labels in (2, 5):
            asked = {"input": ["a text", "another"], "adapter": f"of{labels}"}
            answer = server.http.post("/v1/classify", json=asked).json()
            assert [len(each["probs"]) for each in answer["data"]] == [labels, labels]
            merged = server.http.post("/v1/classify", json={**asked, "mode": "merge"})
            assert "quantized" in error_of(merged, 400, "merge_unsupported")["message"]
        merged = server.http.post("/v1/adapters/of2/activate", json={"mode": "merge"})
        error_of(merged, 400, "merge_unsupported")


def test_a_quantized_encoder(tmp_path: Path) -> None:
    model = tiny_classifier("bert").base_model
    save_pool_model(model, "bert", tmp_path / "base")
    make_pool_adapter(model, HeadSpec(None, seed=1), tmp_path / "a")
    settings = Settings(model=str(tmp_path / "base"), data_dir=tmp_path / "data", task="embed", quantization="int8")
    with InProcessServer(settings) as server:
        form = {"data": {"name": "a"}, "files": parts(tmp_path / "a")}
        assert server.http.post("/v1/adapters", **form).status_code == 201
        plain, adapted = (
            server.http.post("/v1/embeddings", json={"input": "a text", "adapter": name}).json()["data"][0]["embedding"]
            for name in ("base", "a")
        )
        assert len(plain) == len(adapted) == model.config.hidden_size
        assert plain != adapted
