"""The application as `serve deploy` runs it, behind Ray's HTTP proxy: rolled over to other settings under traffic."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.demo.run import ASSETS
from tests.server import ROOT, free_port, parts

ray = pytest.importorskip("ray")
from ray import serve  # noqa: E402
from ray.serve.context import _get_global_client  # noqa: E402
from ray.serve.schema import LoggingConfig, ServeDeploySchema  # noqa: E402

pytestmark = pytest.mark.heavy

ADAPTER = ASSETS / "adapters" / "shout"
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


class Application:
    """Two replicas and an ingress on this machine."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=60)

    def deploy(self, **settings: Any) -> None:
        args = {
            "model": str(ASSETS / "base"),
            "store": f"file://{self._folder}/objects",
            "data_dir": str(self._folder / "data"),
            "threads": 1,
            "drain_timeout_s": 30,
        }
        config = {
            "http_options": {"host": "127.0.0.1", "port": int(self.url.rpartition(":")[2])},
            "logging_config": {"log_level": "WARNING", "enable_access_log": False},
            "applications": [
                {
                    "name": "vblora",
                    "route_prefix": "/",
                    "import_path": "service.ray_app:build_app",
                    "args": {**args, **settings},
                    "deployments": [
                        {"name": "EngineReplica", "num_replicas": 2, "ray_actor_options": {"num_cpus": 1}},
                        {"name": "Ingress", "num_replicas": 1, "ray_actor_options": {"num_cpus": 1}},
                    ],
                }
            ],
        }
        _get_global_client().deploy_apps(ServeDeploySchema(**config), _blocking=True)

    def generate(self, **fields: Any) -> httpx.Response:
        body = {"prompt": "Once upon", "max_new_tokens": 8, "temperature": 0, **fields}
        return self.http.post("/v1/generate", json=body)


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    port = free_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(ROOT))
    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=QUIET)
        app = Application(tmp_path_factory.mktemp("app"), f"http://127.0.0.1:{port}")
        app.deploy()
        response = app.http.post("/v1/adapters", data={"name": "shout"}, files=parts(ADAPTER))
        assert response.status_code == 201, response.text
        yield app
        app.http.close()
    finally:
        serve.shutdown()
        ray.shutdown()
        patch.undo()


def until(condition: Callable[[], bool], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def test_answers_errors_and_streams(application: Application) -> None:
    adapted, base = application.generate(adapter="shout"), application.generate()
    assert adapted.status_code == base.status_code == 200
    assert adapted.json()["choices"][0]["text"] != base.json()["choices"][0]["text"]
    streamed = application.generate(adapter="shout", stream=True).text
    assert streamed.endswith("data: [DONE]\n\n")
    deltas = [json.loads(frame.removeprefix("data: ")) for frame in streamed.split("\n\n")[:-2]]
    assert "".join(each["choices"][0]["text"] for each in deltas) == adapted.json()["choices"][0]["text"]
    missing = application.generate(adapter="none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "adapter_not_found")
    assert missing.headers["x-request-id"]
    assert application.http.get("/readyz").status_code == 200
    assert 'vblora_queue_depth{replica="0"}' in application.http.get("/metrics").text
    assert application.http.get("/").headers["content-type"].startswith("text/html")


def test_a_client_that_leaves_frees_its_row(application: Application) -> None:
    body = {"prompt": "Once", "max_new_tokens": 450, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{application.url}/v1/generate", json=body) as response:
        lines = response.iter_lines()  # kept: the response closes with it
        next(lines)
        assert application.http.get("/v1/stats").json()["running"] == 1
    until(lambda: application.http.get("/v1/stats").json()["running"] == 0)
    assert 'reason="cancelled",replica' in application.http.get("/metrics").text


def test_rolled_over_under_traffic(application: Application) -> None:
    """With other settings of the engine: every replica is another afterwards, and no request has failed."""
    seen: Counter[str] = Counter()
    over = threading.Event()

    def keep_asking(stream: bool) -> None:
        with httpx.Client(base_url=application.url, timeout=60) as http:
            while not over.is_set():
                body = {"prompt": "Once upon", "max_new_tokens": 24, "temperature": 0, "adapter": "shout"}
                try:
                    response = http.post("/v1/generate", json={**body, "stream": stream})
                    whole = response.text.endswith("data: [DONE]\n\n") if stream else True
                    seen[f"{response.status_code} {'whole' if whole else response.text[-200:]}"] += 1
                except httpx.HTTPError as error:
                    seen[repr(error)] += 1

    clients = [threading.Thread(target=keep_asking, args=(stream,)) for stream in (False, True, True)]
    for client in clients:
        client.start()
    try:
        until(lambda: sum(seen.values()) > 5)
        application.deploy(max_batch_size=5)
        until(lambda: application.http.get("/v1/stats").json()["limits"]["max_batch_size"] == 10)
    finally:
        over.set()
        for client in clients:
            client.join()
    assert set(seen) == {"200 whole"}, seen
    assert seen["200 whole"] > 20
    assert application.generate(adapter="shout").status_code == 200
