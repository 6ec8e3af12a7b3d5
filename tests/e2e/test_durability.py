"""A server that is killed, and files that decay, as an operator meets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.server import ROOT, Server
from tests.unit.adapters.store_support import flip_a_bit

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and two adapters."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model("llama")
    save_model(model, folder / "base")
    for seed, name in enumerate(("sql", "style")):
        make_adapter(model, AdapterSpec(seed=seed), folder / name)
    return folder


def serve(folder: Path, data_dir: Path) -> Server:
    return Server("serve", "--model", str(folder / "base"), data_dir=data_dir)


def test_what_was_answered_outlives_a_kill_and_what_decays_is_not_served(folder: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with serve(folder, data_dir) as server:
        digests = {name: server.upload(name, folder / name).json()["digest"] for name in ("sql", "style")}
        assert server.http.post("/v1/adapters/style/activate").status_code == 200
        expected = server.generate("The quick", max_new_tokens=4)["choices"][0]["token_ids"]
        server.kill()

    flip_a_bit(data_dir / "blobs" / "sha256" / digests["sql"][7:] / WEIGHTS)
    (data_dir / "tmp" / "staging-debris").mkdir()
    with serve(folder, data_dir) as server:
        assert list((data_dir / "tmp").iterdir()) == []
        shown = {adapter["name"]: adapter for adapter in server.http.get("/v1/adapters").json()["data"]}
        assert {name: adapter["digest"] for name, adapter in shown.items()} == digests
        assert (shown["sql"]["state"], shown["style"]["state"], shown["style"]["active"]) == ("FAILED", "STORED", True)
        assert "upload it again" in shown["sql"]["reason"]
        refused = server.http.post("/v1/generate", json={"prompt": "The quick", "adapter": "sql"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_unavailable")
        assert "upload it again" in refused.json()["error"]["message"]
        assert server.generate("The quick", max_new_tokens=4)["choices"][0]["token_ids"] == expected
        doctor = [sys.executable, "-m", "service", "doctor", "--data-dir", str(data_dir), "--repair"]
        beside = subprocess.run(doctor, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (beside.returncode, beside.stdout) == (1, "")
        assert f"(id {server.process.pid}): stop that one" in beside.stderr
        assert server.upload("sql", folder / "sql", replace="true").json()["digest"] == digests["sql"]
        server.generate("The quick", adapter="sql", max_new_tokens=4)
        assert server.stop() == 0
    assert subprocess.run(doctor, cwd=ROOT, capture_output=True, check=False).returncode == 0
