"""A server that is killed, and files that decay, as an operator meets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.factories import AdapterSpec, make_adapter, rewrite, save_model, tiny_model
from tests.server import ROOT, Server
from tests.unit.adapters.store_support import banks, flip_a_bit
from tests.unit.adapters.support import BANK

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, two adapters, and one that shares a bank."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model("llama")
    save_model(model, folder / "base")
    for seed, name in enumerate(("sql", "style")):
        make_adapter(model, AdapterSpec(seed=seed), folder / name)
    bank = load_file(folder / "sql" / WEIGHTS)[BANK]
    rewrite(folder / "style", folder / "sibling", tensors={BANK: bank})  # of `sql`: on the same bank
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


def test_a_family_outlives_a_kill_and_has_its_bank_in_common_for_better_and_worse(folder: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    family = ("sql", "sibling")
    with serve(folder, data_dir) as server:
        digests = [server.upload(name, folder / name).json()["digest"] for name in family]
        before = [server.generate("The quick", adapter=name, max_new_tokens=4)["choices"] for name in family]
        exported = [server.http.get(f"/v1/adapters/{name}/export?format=topk").content for name in family]
        server.kill()
    for name, archive in zip(family, exported, strict=True):
        assert (folder / name / WEIGHTS).read_bytes() in archive
    ((bank, adapters),) = banks(data_dir).items()
    assert adapters == 2

    with serve(folder, data_dir) as server:
        after = [server.generate("The quick", adapter=name, max_new_tokens=4)["choices"] for name in family]
        assert [choice["token_ids"] for (choice,) in after] == [choice["token_ids"] for (choice,) in before]
        assert server.stop() == 0

    flip_a_bit(data_dir / "banks" / "sha256" / bank)
    with serve(folder, data_dir) as server:
        states = {adapter["name"]: adapter["state"] for adapter in server.http.get("/v1/adapters").json()["data"]}
        assert states == dict.fromkeys(family, "FAILED")
        again = [server.upload(name, folder / name, replace="true").json()["digest"] for name in family]
        assert again == digests
        server.generate("The quick", adapter="sibling", max_new_tokens=4)
    assert banks(data_dir) == {bank: 2}
