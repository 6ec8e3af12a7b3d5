"""POST /v1/blends: one adapter of several, what it keeps of them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import torch

from adapters.checkpoint import read_checkpoint
from adapters.safetensors_header import read_header
from tests.api.conftest import BASE, Server, error_of
from tests.api.test_chat import bring_template
from tests.unit.adapters.test_blend import assert_is_the_sum


def blend(server: Server, name: str = "mixed", replace: bool = False, **weights: float) -> httpx.Response:
    parts = [{"name": part, "weight": weight} for part, weight in weights.items()]
    return server.client.post("/v1/blends", json={"name": name, "adapters": parts, "replace": replace})


@pytest.fixture
def filled(server: Server) -> Server:
    for name in ("one", "two", "logits"):
        assert server.upload(name, name).status_code == 201
    return server


def test_a_blend_is_an_adapter_like_any_other(filled: Server) -> None:
    response = blend(filled, one=0.7, two=-0.3, logits=1.5)
    assert response.status_code == 201, response.text
    body = response.json()
    assert (body["name"], body["storage"], body["r"]) == ("mixed", "topk", 12)
    stored = read_checkpoint(filled.store.path(body["digest"]))
    weights = {"one": 0.7, "two": -0.3, "logits": 1.5}
    members = [(filled.registry.compact(filled.digest(name)), weight) for name, weight in weights.items()]
    assert_is_the_sum(stored, members)  # type: ignore[arg-type]
    answer = filled.generate(adapter="mixed")
    assert answer.headers["x-adapter-digest"] == body["digest"]
    assert filled.client.get("/v1/adapters/mixed").json()["base"] == BASE


def test_where_it_comes_from_is_kept(filled: Server) -> None:
    digest = blend(filled, one=0.7, two=-0.3).json()["digest"]
    parts = [
        {"name": "one", "digest": filled.digest("one"), "weight": 0.7},
        {"name": "two", "digest": filled.digest("two"), "weight": -0.3},
    ]
    assert filled.client.get("/v1/adapters/mixed").json()["blend"] == parts
    assert filled.client.get("/v1/adapters/one").json()["blend"] is None
    header = json.loads(read_header(filled.store.path(digest) / "adapter_model.safetensors").json)
    assert json.loads(header["__metadata__"]["blend"]) == parts


def test_it_stays_what_it_is_when_its_members_change(filled: Server) -> None:
    digest = blend(filled, one=1.0, two=1.0).json()["digest"]
    filled.upload("one", "logits", query="?replace=true")
    filled.client.delete("/v1/adapters/two")
    assert filled.client.get("/v1/adapters/mixed").json()["digest"] == digest
    assert filled.generate(adapter="mixed").status_code == 200


def test_members_may_be_versions_and_blends(filled: Server) -> None:
    version = filled.digest("one")
    filled.upload("one", "two", query="?replace=true")
    blend(filled, "inner", **{f"one@{version}": 2.0, "logits": 1.0})
    outer = blend(filled, "outer", inner=0.5, two=1.0)
    assert outer.status_code == 201
    members = filled.client.get("/v1/adapters/inner").json()["blend"]
    assert [part["digest"] for part in members] == [version, filled.digest("logits")]


def test_the_same_blend_again(filled: Server) -> None:
    digest = blend(filled, one=0.5, two=0.5).json()["digest"]
    error_of(blend(filled, one=0.5, two=0.5), 409, "adapter_exists")
    again = blend(filled, replace=True, one=0.5, two=0.5)
    assert (again.status_code, again.json()["digest"]) == (201, digest), "to the byte"
    assert blend(filled, replace=True, one=0.4, two=0.6).json()["digest"] != digest


def test_the_chat_template_of_its_members_is_kept(server: Server) -> None:
    bring_template(server, "one", "{{ messages[0].content }}!")
    server.upload("two", "two")
    blend(server, one=1.0, two=1.0)
    chat = {"model": "mixed", "messages": [{"role": "user", "content": "hi"}]}
    assert server.client.post("/v1/chat/completions", json=chat).status_code == 200
    assert bytes(server.engine.requests[-1].prompt_ids) == b"hi!"
    bring_template(server, "other", "other", "logits")
    assert "chat templates" in error_of(blend(server, "both", one=1.0, other=1.0), 400, "invalid_request")["message"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"name": "x", "adapters": []}, 400, "invalid_request"),
        ({"name": "x", "adapters": [{"name": "nobody"}]}, 404, "adapter_not_found"),
        ({"name": "x", "adapters": [{"name": "base"}]}, 400, "invalid_request"),
        ({"name": "x", "adapters": [{"name": "one", "weight": 1e9}]}, 400, "invalid_request"),
        ({"name": BASE, "adapters": [{"name": "one"}]}, 400, "invalid_request"),
        ({"name": "../x", "adapters": [{"name": "one"}]}, 400, "invalid_request"),
        ({"name": "x", "adapters": [{"name": "one"}], "color": 1}, 400, "invalid_request"),
        ({"adapters": [{"name": "one"}]}, 400, "invalid_request"),
    ],
)
def test_what_is_refused(filled: Server, body: dict[str, Any], status: int, code: str) -> None:
    error_of(filled.client.post("/v1/blends", json=body), status, code)
    assert [adapter["name"] for adapter in filled.client.get("/v1/adapters").json()["data"]] == ["logits", "one", "two"]


def test_a_blend_of_weight_1_computes_the_same(filled: Server) -> None:
    digest = blend(filled, one=1.0).json()["digest"]
    same, own = filled.registry.pin(digest), filled.registry.pin(filled.digest("one"))
    for name, layer in own.layers.items():
        mine, other = (each.b_t.T @ each.a for each in (layer, same.layers[name]))
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
