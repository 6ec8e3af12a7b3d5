"""A classifier with API keys as clients meet it: foreign labels, adapters that come and go, its end and a new start."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import error_of
from tests.e2e.test_api_keys import make_key
from tests.pooling_factory import HeadSpec, make_pool_adapter, save_pool_model, tiny_classifier
from tests.server import Server, parts

ASKERS = 4
ASKED = 60  # requests of each
MANY = 2000  # inputs of one request
KINDS = {"two": 2, "three": 3, "five": 5}


class Client(httpx.Client):
    """What one key can do."""

    def upload(self, name: str, adapter: Path, *labels: str, replace: bool = False) -> httpx.Response:
        files = {**parts(adapter), "labels": ("labels.json", json.dumps(labels).encode())}
        query = {"replace": "true"} if replace else {}
        return self.post("/v1/adapters", params=query, data={"name": name}, files=files)

    def classify(self, model: str | None = None, input: Any = "what a day", **fields: Any) -> httpx.Response:
        return self.post("/v1/classify", json={"input": input, "model": model, **fields})


class Place:
    """A base, adapters with heads of several sizes, and keys, on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = tiny_classifier("roberta")
        save_pool_model(model, "roberta", folder / "base")
        for name, labels in KINDS.items():
            make_pool_adapter(model, HeadSpec(labels, seed=labels), folder / name)
        self.keys = {tenant: make_key(folder / "keys", "--tenant", tenant) for tenant in ("acme", "rival")}

    def server(self) -> Server:
        options = ["--model", str(self.folder / "base"), "--task", "classify", "--max-queue", str(MANY)]
        return Server("serve", *options, "--api-key-file", str(self.folder / "keys"), data_dir=self.folder / "data")

    def client(self, server: Server, tenant: str) -> Client:
        return Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {self.keys[tenant]}"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[Server]:
    with place.server() as server:
        yield server


def test_nobody_learns_anothers_labels(place: Place, server: Server) -> None:
    """Neither by a name, nor by the digest, nor beside an adapter of one's own that has the same weights."""
    with place.client(server, "acme") as acme, place.client(server, "rival") as rival:
        assert acme.upload("secret", place.folder / "two", "guilty", "innocent").status_code == 201
        assert rival.upload("mine", place.folder / "two", "yes", "no").status_code == 201
        digest = acme.get("/v1/adapters/secret").json()["digest"]
        assert acme.classify("secret").json()["data"][0]["label"] in ("guilty", "innocent")
        assert rival.classify("mine").json()["data"][0]["label"] in ("yes", "no")
        for model in ("secret", f"secret@{digest}", f"mine@{digest}", "mine:0.5+secret:0.5"):
            refused = rival.classify(model)
            error_of(refused, 404, "adapter_not_found")
            assert "guilty" not in refused.text
        assert acme.post("/v1/adapters/secret/activate").status_code == 200
        assert [client.classify().json()["model"] for client in (acme, rival)] == ["secret", "base"]
        assert acme.delete("/v1/adapters/secret").status_code == 204


def test_answers_while_adapters_come_and_go(place: Place, server: Server) -> None:
    """Each is whole: the labels, their number and the probabilities are one version's, also folded in."""
    done = threading.Event()

    def come_and_go() -> set[int]:
        statuses = set()
        with place.client(server, "acme") as client:
            while not done.is_set():
                for name, labels in KINDS.items():
                    own = [f"{name}-{i}" for i in range(labels)]
                    statuses.add(client.upload("changing", place.folder / name, *own, replace=True).status_code)
                statuses.add(client.delete("/v1/adapters/changing").status_code)
        return statuses

    def ask(asker: int) -> list[httpx.Response]:
        mode = "merge" if asker == 0 else "switch"
        with place.client(server, "acme") as client:
            return [client.classify("changing", ["hello", "you"], mode=mode) for _ in range(ASKED)]

    with ThreadPoolExecutor(ASKERS + 1) as pool:
        changing = pool.submit(come_and_go)
        try:
            answers = [answer for asked in pool.map(ask, range(ASKERS)) for answer in asked]
        finally:
            done.set()
        assert changing.result() == {201, 204}
    served = [answer for answer in answers if answer.status_code == 200]
    assert served
    for answer in answers:
        if answer not in served:
            error_of(answer, 404, "adapter_not_found")
    for each in (each for answer in served for each in answer.json()["data"]):
        name, _, number = each["label"].partition("-")
        assert each["num_classes"] == len(each["probs"]) == KINDS[name]
        assert each["probs"].index(max(each["probs"])) == int(number)
        assert sum(each["probs"]) == pytest.approx(1)
    assert not [line for line in server.log if "Traceback" in line or "ERROR" in line]


def test_it_ends_its_answers_and_starts_again_with_its_adapters(place: Place, server: Server) -> None:
    with place.client(server, "acme") as acme:
        assert acme.upload("kept", place.folder / "five", *"vwxyz").status_code == 201
        assert acme.post("/v1/adapters/kept/activate").status_code == 200
        before = acme.classify().json()["data"]
        assert before[0]["label"] in tuple("vwxyz")
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(acme.classify, None, ["word " * 12] * MANY)
            while "vblora_queue_depth 0.0" in acme.get("/metrics").text:
                assert not running.done()
            assert server.stop() == 0
            assert running.result().status_code == 200
            assert len(running.result().json()["data"]) == MANY
    with place.server() as again, place.client(again, "acme") as acme:
        assert acme.classify().json()["data"] == before
        with place.client(again, "rival") as rival:
            error_of(rival.classify("kept"), 404, "adapter_not_found")
