"""Servers on one shared store, each a process: what one is told, the others know within two seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.server import Server
from tests.unit.adapters.shared_support import BUCKET, CREDENTIALS, s3_server, until

WITHIN_S = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and two adapters."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model("llama")
    save_model(model, folder / "base")
    for seed, name in enumerate(("sql", "style")):
        make_adapter(model, AdapterSpec(seed=seed, bank_bound=2.0), folder / name)
    return folder


@pytest.fixture(params=["file", "s3"])
def serve(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    with ExitStack() as opened:
        store = [f"--store=file://{tmp_path}/objects"]
        if request.param == "s3":
            endpoint = opened.enter_context(s3_server())
            store = [f"--store=s3://{BUCKET}/prefix", f"--store-endpoint={endpoint}"]

        def serve(name: str) -> Server:
            arguments = ("serve", "--model", str(folder / "base"), *store)
            return Server(*arguments, data_dir=tmp_path / name, environ={**os.environ, **CREDENTIALS})

        yield serve


def tokens(server: Server, **fields: object) -> list[int]:
    chosen: list[int] = server.generate("The quick", max_new_tokens=6, **fields)["choices"][0]["token_ids"]
    return chosen


def seen(condition: Callable[[], bool]) -> None:
    assert until(condition) < WITHIN_S


def test_two_servers(serve: Callable[[str], Server], folder: Path) -> None:
    with serve("one") as one, serve("other") as other:
        base = tokens(other)
        uploaded = one.upload("mine", folder / "sql")
        assert uploaded.status_code == 201, uploaded.text
        seen(lambda: other.http.get("/v1/adapters/mine").status_code == 200)
        assert other.http.get("/v1/adapters/mine").json()["digest"] == uploaded.json()["digest"]
        sql = tokens(one, adapter="mine")
        assert tokens(other, adapter="mine") == sql != base

        replaced = other.upload("mine", folder / "style", replace="true").json()["digest"]
        seen(lambda: one.http.get("/v1/adapters/mine").json()["digest"] == replaced)
        assert tokens(one, adapter="mine") == tokens(other, adapter="mine") != sql

        assert one.http.post("/v1/adapters/mine/activate", json={"mode": "merge"}).status_code == 200
        seen(lambda: other.http.get("/v1/adapters/mine").json()["active"])
        assert tokens(other) == tokens(one, adapter="mine"), "folded here, too"
        assert other.http.post("/v1/adapters/mine/deactivate").status_code == 200
        seen(lambda: not one.http.get("/v1/adapters/mine").json()["active"])
        assert tokens(one) == tokens(other) == base, "and restored"

        assert one.http.delete("/v1/adapters/mine").status_code == 204
        seen(lambda: other.http.get("/v1/adapters/mine").status_code == 404)
        refused = other.http.post("/v1/generate", json={"prompt": "The quick", "adapter": "mine"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "adapter_not_found")


def test_a_third_server_starts_later_and_one_is_killed(serve: Callable[[str], Server], folder: Path) -> None:
    with serve("one") as one:
        one.upload("mine", folder / "sql")
        one.http.post("/v1/adapters/mine/activate")
        expected = tokens(one)
        one.kill()
    with serve("late") as late:
        assert tokens(late) == expected
        assert late.http.get("/v1/adapters/mine").json()["active"]


def test_the_storage_goes_and_comes_back(folder: Path, tmp_path: Path) -> None:
    objects, away = tmp_path / "objects", tmp_path / "away"
    arguments = ("serve", "--model", str(folder / "base"), f"--store=file://{objects}", "--store-refresh-s=0.1")
    with Server(*arguments, data_dir=tmp_path / "data") as server:
        server.upload("mine", folder / "sql")
        expected = tokens(server, adapter="mine")
        until(lambda: metric(server, "vblora_store_refresh_age_seconds") < 0.5)
        os.rename(objects, away)
        until(lambda: metric(server, "vblora_store_refresh_age_seconds") > 0.5)
        assert tokens(server, adapter="mine") == expected
        assert server.http.get("/readyz").status_code == 200
        refused = server.upload("more", folder / "style")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert "mount its directory again" in refused.json()["error"]["message"]
        assert metric(server, "vblora_store_errors_total") > 1
        os.rename(away, objects)
        until(lambda: metric(server, "vblora_store_refresh_age_seconds") < 0.5)
        assert server.upload("more", folder / "style").status_code == 201


def metric(server: Server, name: str) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])
