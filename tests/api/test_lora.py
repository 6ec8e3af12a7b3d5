"""vLLM's routes: its scripts load and unload adapters here as they do there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.hub_ids import HubPattern
from tests.api.conftest import Server, error_of
from tests.fake_hub import FakeHub


@pytest.fixture
def root(tmp_path: Path, adapter_dirs: dict[str, Path]) -> Path:
    """An allowed root with the adapters `one` and `two`."""
    for name in ("one", "two"):
        shutil.copytree(adapter_dirs[name], tmp_path / "root" / name)
    return tmp_path / "root"


@pytest.fixture
def server(make_server: Callable[..., Server], root: Path) -> Server:
    return make_server(allow_source=(root,), allow_hub=(HubPattern.parse("hf://org/*"),))


def load(server: Server, path: object, name: str = "sql", **fields: Any) -> httpx.Response:
    return server.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})


def unload(server: Server, name: str = "sql", **fields: Any) -> httpx.Response:
    return server.client.post("/v1/unload_lora_adapter", json={"lora_name": name, **fields})


def assert_says(response: httpx.Response, text: str) -> None:
    assert (response.status_code, response.text) == (200, text)
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


def test_loaded_served_unloaded(server: Server, root: Path) -> None:
    assert_says(load(server, root / "one"), "Success: LoRA adapter 'sql' added successfully.")
    assert server.generate(adapter="sql").status_code == 200
    assert_says(unload(server, lora_int_id=1), "Success: LoRA adapter 'sql' removed successfully.")
    server.assert_nothing_left()


def test_loading_the_same_files_again_succeeds_and_changes_nothing(server: Server, root: Path) -> None:
    load(server, root / "one")
    before = server.client.get("/v1/adapters/sql").json()
    assert load(server, root / "one").status_code == 200
    assert server.client.get("/v1/adapters/sql").json() == before


def test_other_files_under_the_same_name_are_a_conflict_unless_in_place(server: Server, root: Path) -> None:
    load(server, root / "one")
    first = server.digest("sql")
    error_of(load(server, root / "two"), 409, "adapter_exists")
    assert server.digest("sql") == first
    assert load(server, root / "two", load_inplace=True).status_code == 200
    assert server.digest("sql") != first


@pytest.mark.parametrize("path", ["hf://org/sql", "org/sql"])
def test_repositories_of_the_hub(server: Server, hub: FakeHub, adapter_dirs: dict[str, Path], path: str) -> None:
    hub.add("org/sql", adapter_dirs["one"])
    assert load(server, path).status_code == 200
    assert server.generate(adapter="sql").status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("other/sql", 403, "forbidden"),
        ("/etc", 403, "forbidden"),
        ("{root}/none", 400, "invalid_request"),
        ("./one", 400, "invalid_request"),
        ("one", 400, "invalid_request"),
        ("", 400, "invalid_request"),
    ],
)
def test_paths_that_are_refused(server: Server, root: Path, path: str, status: int, code: str) -> None:
    assert error_of(load(server, path.format(root=root)), status, code)["param"] == "lora_path"
    server.assert_nothing_left()


def test_a_checkpoint_that_is_refused(server: Server, root: Path) -> None:
    (root / "one" / "adapter_model.safetensors").write_bytes(b"no")
    error_of(load(server, root / "one"), 422, "invalid_safetensors")
    server.assert_nothing_left()


@pytest.mark.parametrize("name", ["base", "a/b", ""])
def test_names_that_no_adapter_may_have(server: Server, root: Path, name: str) -> None:
    error_of(load(server, root / "one", name), 400, "invalid_request")


def test_unloading_what_is_not_there(server: Server) -> None:
    error_of(unload(server), 404, "adapter_not_found")


def test_unknown_fields_are_named(server: Server, root: Path) -> None:
    assert error_of(load(server, root / "one", lora_rank=4), 400, "invalid_request")["param"] == "lora_rank"
    assert error_of(unload(server, force=True), 400, "invalid_request")["param"] == "force"
