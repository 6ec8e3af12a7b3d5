"""The parameter counts over HTTP. That they are PEFT's is tested where they are computed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import BASE, Server, error_of

KEYS = {
    "adapter", "digest", "storage", "vblora_params", "other_params", "total_params", "vector_bank_params",
    "logits_params", "logit_positions", "topk_indices_params", "topk_weights_params", "index_dtype",
    "full_logits_params", "lora_params", "r", "num_vectors", "vector_length", "topk", "file_bytes", "summary",
}  # fmt: skip
LAYERS = [{"name": "q", "in_features": 64, "out_features": 32}]


def estimate(server: Server, **body: Any) -> Any:
    return server.client.post("/v1/parameters/estimate", json=body)


def test_an_adapters_count_has_the_contracts_keys(server: Server) -> None:
    server.upload("sql")
    count = server.client.get("/v1/adapters/sql/parameters").json()
    assert set(count) == KEYS
    assert (count["adapter"], count["digest"], count["storage"]) == ("sql", server.digest("sql"), "topk")
    assert count["file_bytes"] == sum(map(len, server.form().values()))
    total = f"{count['total_params']:,}"
    assert count["summary"].endswith(f"total params to-be-saved: {total}")


def test_the_base_and_every_adapter_are_counted_page_by_page(server: Server) -> None:
    for name in "abc":
        server.upload(name)
    page = server.client.get("/v1/parameters?limit=2").json()
    assert page["base"] == {"id": BASE, "model_type": "llama", "total_params": 12345}
    assert [count["adapter"] for count in page["adapters"]] == ["a", "b"]
    last = server.client.get(f"/v1/parameters?after={page['next']}").json()
    assert [count["adapter"] for count in last["adapters"]] == ["c"]
    assert last["next"] is None
    assert last["adapters"][0] == server.client.get("/v1/adapters/c/parameters").json()


def test_an_estimate_for_the_loaded_base_is_what_the_adapter_counts(server: Server) -> None:
    server.upload("sql")
    count = server.client.get("/v1/adapters/sql/parameters").json()
    config = server.client.get("/v1/adapters/sql").json()["config"]
    assert estimate(server, config=config).json() == {**count, "adapter": None, "digest": None, "file_bytes": None}


def test_an_estimate_may_bring_its_own_layers(server: Server) -> None:
    config = {"r": 2, "num_vectors": 8, "vector_length": 16, "topk": 2}
    count = estimate(server, config=config, layers=LAYERS).json()
    assert set(count) == KEYS
    assert count["logit_positions"] == 2 * (64 + 32) // 16
    assert count["lora_params"] == 2 * (64 + 32)
    assert count["storage"] == "logits"
    compact = estimate(server, config={**config, "save_only_topk_weights": True}, layers=LAYERS).json()
    assert compact["storage"] == "topk"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "invalid_request", "config"),
        ({"config": []}, 400, "invalid_request", "config"),
        ({"config": {}, "layer": []}, 400, "invalid_request", "layer"),
        ({"config": {}, "layers": []}, 400, "invalid_request", "layers"),
        ({"config": {}, "layers": [{**LAYERS[0], "in_features": 0}]}, 400, "invalid_request", "layers[0].in_features"),
        ({"config": {"r": 0}}, 422, "bad_config", "r"),
        ({"config": {"peft_type": "LORA"}}, 415, "unsupported_checkpoint", "peft_type"),
        ({"config": {"vector_length": 48}}, 422, "shape_mismatch", "model.layers.0.self_attn.q_proj"),
        ({"config": {"vector_length": 48}, "layers": LAYERS}, 422, "shape_mismatch", "q"),
        ({"config": {"target_modules": ["nothing"]}}, 422, "no_target_matched", "target_modules"),
        ({"config": {"target_modules": "("}}, 422, "bad_config", "target_modules"),
    ],
)
def test_what_cannot_be_estimated_is_refused(
    server: Server, body: Any, status: int, code: str, param: str | None
) -> None:
    assert error_of(estimate(server, **body), status, code)["param"] == param


@pytest.mark.parametrize(
    ("width", "layers", "full", "compact", "lora"),
    [(4096, 32 * 4, 998_400, 39_936, 4_194_304), (768, 12 * 2, 49_920, 16_224, 147_456)],
    ids=["a 7B model's attention", "opt-125m, q and v"],
)
def test_the_worked_examples(server: Server, width: int, layers: int, full: int, compact: int, lora: int) -> None:
    config = {"r": 4, "num_vectors": 60, "vector_length": 256, "topk": 2}
    shapes = [{"name": f"layer.{i}", "in_features": width, "out_features": width} for i in range(layers)]
    for stored_compact, expected in ((False, full), (True, compact)):
        body = {**config, "save_only_topk_weights": stored_compact}
        count = estimate(server, config=body, layers=shapes).json()
        assert (count["vblora_params"], count["full_logits_params"], count["lora_params"]) == (expected, full, lora)
