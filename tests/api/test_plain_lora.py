"""Plain LoRA adapters over HTTP: taken, counted, blended, exported, and refused as clearly as VB-LoRA ones."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from adapters.lora import LoRACheckpoint
from adapters.reading import read_adapter
from tests.api.conftest import Server, error_of
from tests.factories import tiny_model
from tests.lora_factory import make_lora
from tests.server import parts

VBLORA_FIELDS = ("num_vectors", "vector_length", "topk", "vblora_params")
OWN_PARAMS = 2 * (4 * (64 + 64) + 9 * (64 + 32))  # two layers of q_proj, and of v_proj at its own rank


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields: dict[str, Any] = {"rank_pattern": {"v_proj": 9}, "target_modules": ["q_proj", "v_proj"]}
    return make_lora(tiny_model("llama"), tmp_path_factory.mktemp("plain") / "plain", **fields)


@pytest.fixture
def filled(server: Server, plain: Path) -> Server:
    assert server.upload("vblora", "one").status_code == 201
    response = server.client.post("/v1/adapters", data={"name": "plain"}, files=parts(plain))
    assert response.status_code == 201, response.text
    return server


def test_it_is_an_adapter_like_any_other(filled: Server) -> None:
    view = filled.client.get("/v1/adapters/plain").json()
    assert (view["storage"], view["r"], view["total_params"], view["resumable"]) == ("lora", 4, OWN_PARAMS, True)
    assert [view[field] for field in VBLORA_FIELDS] == [None] * 4
    assert view["config"]["rank_pattern"] == {"v_proj": 9}
    assert len(view["target_modules"]) == 4
    assert [adapter["storage"] for adapter in filled.client.get("/v1/adapters").json()["data"]] == ["lora", "topk"]
    answer = filled.generate(adapters=[{"name": "plain", "weight": 0.5}, {"name": "vblora", "weight": 0.5}])
    assert [part["name"] for part in answer.json()["selection"]["adapters"]] == ["plain", "vblora"]


def test_it_is_counted(filled: Server) -> None:
    count = filled.client.get("/v1/adapters/plain/parameters").json()
    assert count["lora_params"] == count["total_params"] == OWN_PARAMS
    assert (count["storage"], count["other_params"], count["r"]) == ("lora", 0, 4)
    of_lora = {"adapter", "digest", "storage", "lora_params", "other_params", "total_params", "r"}
    assert {key for key, value in count.items() if value is not None} == of_lora | {"file_bytes", "summary"}
    listed = filled.client.get("/v1/parameters").json()["adapters"]
    assert listed == [count, filled.client.get("/v1/adapters/vblora/parameters").json()]


def test_a_stored_blend_with_vb_lora_is_a_plain_lora(filled: Server) -> None:
    members = [{"name": "plain", "weight": 0.5}, {"name": "vblora", "weight": -2.0}]
    response = filled.client.post("/v1/blends", json={"name": "mixed", "adapters": members})
    assert response.status_code == 201, response.text
    body = response.json()
    assert (body["storage"], body["r"], body["num_vectors"]) == ("lora", 9 + 4, None)
    assert isinstance(read_adapter(filled.store.path(body["digest"])), LoRACheckpoint)
    assert [part["name"] for part in filled.client.get("/v1/adapters/mixed").json()["blend"]] == ["plain", "vblora"]
    assert filled.generate(adapter="mixed").headers["x-adapter-digest"] == body["digest"]


def test_exports(filled: Server, plain: Path, tmp_path: Path) -> None:
    for name in ("plain", "vblora"):
        response = filled.client.get(f"/v1/adapters/{name}/export?format=lora")
        assert response.status_code == 200, response.text
        with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
            archive.extractall(tmp_path, filter="data")
        assert isinstance(read_adapter(tmp_path / name), LoRACheckpoint)
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (plain / file.name).read_bytes()
    for format in ("topk", "logits"):
        error = error_of(filled.client.get(f"/v1/adapters/plain/export?format={format}"), 400, "invalid_request")
        assert error["param"] == "format"


def test_a_new_version_may_be_of_the_other_type(filled: Server, plain: Path) -> None:
    response = filled.client.post("/v1/adapters?replace=true", data={"name": "vblora"}, files=parts(plain))
    assert (response.status_code, response.json()["storage"]) == (201, "lora")
    digests = [version["digest"] for version in filled.client.get("/v1/adapters/vblora").json()["versions"]]
    back = filled.client.post("/v1/adapters/vblora/rollback", json={"digest": digests[-1]})
    assert back.json()["storage"] == "topk"


@pytest.mark.parametrize(
    ("config", "status", "code", "param"),
    [
        ({"use_dora": True}, 415, "unsupported_checkpoint", "use_dora"),
        ({"init_lora_weights": "pissa"}, 415, "unsupported_checkpoint", "init_lora_weights"),
        ({"lora_alpha": -1}, 422, "bad_config", "lora_alpha"),
        ({"rank_pattern": {}}, 422, "shape_mismatch", "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"),
        ({"target_modules": ["q_proj"]}, 422, "unexpected_tensor", "model.layers.0.self_attn.v_proj"),
        ({"base_model_name_or_path": "other/base"}, 422, "base_model_mismatch", "base_model_name_or_path"),
    ],
)
def test_a_refused_one_leaves_nothing(
    server: Server, plain: Path, config: dict[str, Any], status: int, code: str, param: str
) -> None:
    files = parts(plain)
    changed = json.dumps({**json.loads(files["config"][1]), **config}).encode()
    response = server.client.post("/v1/adapters", data={"name": "bad"}, files={**files, "config": changed})
    assert error_of(response, status, code)["param"] == param
    server.assert_nothing_left()
