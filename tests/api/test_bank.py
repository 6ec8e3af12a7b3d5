"""GET /v1/adapters/{name}/bank. That its numbers are right is tested where they are computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.conftest import Server, error_of
from tests.factories import tiny_model
from tests.lora_factory import make_lora
from tests.server import parts

KEYS = {
    "adapter", "digest", "num_vectors", "vector_length", "topk", "columns", "vectors_per_column", "layers",
    "used_vectors", "unused_vectors",
}  # fmt: skip


@pytest.mark.parametrize(
    ("query", "columns", "per_column"), [("", 32, 1), ("?columns=1024", 32, 1), ("?columns=10", 8, 4)]
)
@pytest.mark.parametrize("adapter", ["one", "logits"])
def test_how_an_adapters_layers_use_its_bank(
    server: Server, adapter: str, query: str, columns: int, per_column: int
) -> None:
    server.upload("sql", adapter)
    response = server.client.get(f"/v1/adapters/sql/bank{query}")
    assert response.headers["content-type"] == "application/json"
    bank = response.json()
    assert set(bank) == KEYS
    assert (bank["adapter"], bank["digest"]) == ("sql", server.digest("sql"))
    assert (bank["num_vectors"], bank["vector_length"], bank["topk"]) == (32, 16, 2)
    assert (bank["columns"], bank["vectors_per_column"]) == (columns, per_column)
    assert bank["used_vectors"] + bank["unused_vectors"] == 32
    assert bank["used_vectors"] > 0
    layers = server.client.get("/v1/adapters/sql").json()["target_modules"]
    assert [layer["name"] for layer in bank["layers"]] == layers
    for layer in bank["layers"]:
        assert set(layer) == {"name", "A", "B"}
        for side in "AB":
            assert len(layer[side]) == columns
            assert sum(layer[side]) == pytest.approx(1.0, abs=1e-5)
            assert min(layer[side]) >= 0
    if columns == 32 and adapter == "one":
        used = {i for layer in bank["layers"] for side in "AB" for i, share in enumerate(layer[side]) if share}
        assert len(used) == bank["used_vectors"]


def test_a_new_version_has_its_own(server: Server) -> None:
    server.upload("sql")
    before = server.client.get("/v1/adapters/sql/bank").json()
    server.upload("sql", "two", "?replace=true")
    after = server.client.get("/v1/adapters/sql/bank").json()
    assert after["digest"] != before["digest"]
    assert after["layers"] != before["layers"]


def test_a_plain_lora_has_no_bank(server: Server, tmp_path: Path) -> None:
    files = parts(make_lora(tiny_model("llama"), tmp_path / "plain"))
    assert server.client.post("/v1/adapters", data={"name": "plain"}, files=files).status_code == 201
    error = error_of(server.client.get("/v1/adapters/plain/bank"), 400, "invalid_request")
    assert "plain LoRA" in error["message"]


def test_what_cannot_be_shown_is_refused(server: Server) -> None:
    server.upload("sql")
    for columns in ("0", "1025", "-1", "many"):
        error = error_of(server.client.get(f"/v1/adapters/sql/bank?columns={columns}"), 400, "invalid_request")
        assert error["param"] == "columns"
    error_of(server.client.get("/v1/adapters/sql/bank?rows=3"), 400, "invalid_request")
    error_of(server.client.get("/v1/adapters/none/bank"), 404, "adapter_not_found")
    server.client.delete("/v1/adapters/sql")
    error_of(server.client.get("/v1/adapters/sql/bank"), 404, "adapter_not_found")
