"""`serve --replicas 2`: a Ray of its own, two replicas on the CPU, the demo's model, and clients over real sockets."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.demo.run import ASSETS
from tests.server import Server

pytest.importorskip("ray")
pytestmark = pytest.mark.heavy

ADAPTERS = sorted(path.name for path in (ASSETS / "adapters").iterdir())
WITHIN_S = 60
LONG = {"max_new_tokens": 400, "ignore_eos": True, "temperature": 0}


def start(data_dir: Path, *more: str) -> Server:
    return Server("serve", "--model", str(ASSETS / "base"), "--replicas", "2", *more, data_dir=data_dir)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two replicas with the demo's adapters."""
    with start(tmp_path_factory.mktemp("data")) as server:
        for name in ADAPTERS:
            assert server.upload(name, ASSETS / "adapters" / name).status_code == 201
        yield server


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def samples(server: Server, name: str) -> dict[str, float]:
    """The values of a metric by their first label."""
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


def processes(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def replicas(server: Server) -> list[psutil.Process]:
    return [each for each in processes(server) if "ServeReplica" in " ".join(each.cmdline())]


def stream(server: Server, body: dict[str, Any], begun: Callable[[], None] = lambda: None) -> list[str]:
    """The frames of a stream, as they came."""
    frames = []
    with httpx.stream("POST", f"{server.url}/v1/generate", json={**body, "stream": True}, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line:
                frames.append(line)
                begun()
    return frames


def test_what_was_uploaded_is_there_at_once_wherever_a_request_goes(server: Server) -> None:
    for i in range(5):
        name = f"fresh-{i}"
        digest = server.upload(name, ASSETS / "adapters" / ADAPTERS[i % len(ADAPTERS)]).json()["digest"]
        for _ in range(4):
            assert server.http.get(f"/v1/adapters/{name}").json()["digest"] == digest
            assert server.generate("Hi", adapter=name, max_new_tokens=2)["selection"]["adapters"][0]["digest"] == digest
        assert server.http.delete(f"/v1/adapters/{name}").status_code == 204
        for _ in range(4):
            assert server.http.get(f"/v1/adapters/{name}").status_code == 404


def test_each_adapter_is_composed_on_one_replica(server: Server) -> None:
    expected = {name: server.generate("Once upon", adapter=name)["choices"][0]["text"] for name in ADAPTERS}
    for _ in range(6):
        for name in ADAPTERS:
            assert server.generate("Once upon", adapter=name)["choices"][0]["text"] == expected[name]
    composes = samples(server, "vblora_adapter_composes_total")
    assert set(composes) == {"0", "1"}
    assert sum(composes.values()) == len(ADAPTERS), "the same files under another name are the same adapter"
    assert samples(server, "vblora_routed_total")["spilled"] == 0


def test_requests_without_adapters_are_spread(server: Server) -> None:
    before = samples(server, "vblora_completion_tokens_total")
    for _ in range(20):
        server.generate("Once upon", max_new_tokens=2)
    after = samples(server, "vblora_completion_tokens_total")
    assert all(after[replica] > before[replica] for replica in ("0", "1"))


def test_activation_counts_on_every_replica(server: Server) -> None:
    name = ADAPTERS[0]
    base, adapted = server.generate("Once upon"), server.generate("Once upon", adapter=name)
    assert server.http.post(f"/v1/adapters/{name}/activate").status_code == 200
    try:
        for _ in range(6):
            assert server.generate("Once upon")["choices"][0]["text"] == adapted["choices"][0]["text"]
    finally:
        assert server.http.post(f"/v1/adapters/{name}/deactivate").status_code == 200
    for _ in range(6):
        assert server.generate("Once upon")["choices"][0]["text"] == base["choices"][0]["text"]


def test_a_client_that_leaves_frees_its_row(server: Server) -> None:
    body = {"prompt": "Once upon", "stream": True, **LONG}
    with httpx.stream("POST", f"{server.url}/v1/generate", json=body) as response:
        lines = response.iter_lines()  # kept: the response closes with it
        next(lines)
        assert sum(samples(server, "vblora_running_sequences").values()) == 1
    until(lambda: sum(samples(server, "vblora_running_sequences").values()) == 0)
    finished = server.http.get("/metrics").text
    assert 'vblora_finished_choices_total{reason="cancelled"' in finished
    assert sum(samples(server, "vblora_tenant_completion_tokens_total").values()) < LONG["max_new_tokens"]


def test_one_that_stands_still_does_not_keep_back_what_the_others_say(server: Server) -> None:
    still = replicas(server)[0]
    still.suspend()
    try:
        assert len(samples(server, "vblora_queue_depth")) == 1
        assert server.http.get("/v1/stats").status_code == 200
    finally:
        still.resume()
    until(lambda: len(samples(server, "vblora_queue_depth")) == 2)


def test_all_ports_but_the_servers_are_on_loopback(server: Server) -> None:
    listening = [
        connection.laddr.ip
        for process in [psutil.Process(server.process.pid), *processes(server)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_one_log(server: Server) -> None:
    server.http.post("/v1/generate", json={"prompt": "Hi", "max_new_tokens": 3}, headers={"X-Request-ID": "mine-1"})
    until(lambda: any("request_id=mine-1" in line for line in server.log))
    (line,) = [line for line in server.log if "request_id=mine-1" in line]
    assert " INFO vblora.access: request " in line
    assert "completion_tokens=3" in line
    assert "code=" not in line
    assert sum("loaded the base model" in line for line in server.log) >= 2
    assert not any("pid=" in line or "_ray_" in line for line in server.log)


def test_a_replica_that_is_killed_breaks_its_own_streams_alone(server: Server) -> None:
    """Last but one of this server's: its replica is another afterwards."""
    before = replicas(server)
    assert len(before) == 2
    begun = threading.Semaphore(0)
    bodies = [{"prompt": f"Once {i}", **LONG} for i in range(8)]

    def follow(body: dict[str, Any]) -> list[str]:
        first = threading.Event()

        def note() -> None:
            if not first.is_set():
                first.set()
                begun.release()

        return stream(server, body, note)

    with ThreadPoolExecutor(len(bodies)) as pool:
        streams = [pool.submit(follow, body) for body in bodies]
        for _ in bodies:
            assert begun.acquire(timeout=WITHIN_S)
        running = samples(server, "vblora_running_sequences")
        before[0].kill()
        ends = [each.result()[-2:] for each in streams]
    broken = [end for end in ends if end[0] == "event: error"]
    assert sorted(len(each) for each in (broken, [e for e in ends if e[1] == "data: [DONE]"])) == sorted(
        int(count) for count in running.values()
    ), "all those of one replica, and none of the other's"
    for _, data in broken:
        assert json.loads(data.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert server.http.get("/readyz").status_code == 200
    assert any("lost a replica" in line for line in server.log)
    until(lambda: any(" WARNING ray.serve: " in line for line in server.log))
    assert not any(re.match(r"WARNING|ERROR|\S+ \S+\t(WARNING|ERROR)|\t", line) for line in server.log), "Ray's own"
    for name in ADAPTERS:
        assert server.generate("Once upon", adapter=name, max_new_tokens=2)
    until(lambda: samples(server, "vblora_replicas") == {"": 2.0})
    for name in ADAPTERS:
        assert server.generate("Once upon", adapter=name, max_new_tokens=2)


def test_sigterm_lets_requests_end_and_ends_everything(tmp_path: Path) -> None:
    with start(tmp_path, "--drain-timeout-s", "60") as server:
        everything = processes(server)
        sent = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(stream, server, {"prompt": "Once", **LONG}, sent.set)
            assert sent.wait(WITHIN_S)
            os.kill(server.process.pid, signal.SIGTERM)
            assert running.result()[-1] == "data: [DONE]"
        assert server.process.wait(WITHIN_S) == 0
        _, alive = psutil.wait_procs(everything, timeout=WITHIN_S)
        assert alive == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two replicas that take two requests each, and keys of two tenants."""
    folder = tmp_path_factory.mktemp("small")
    keys = folder / "keys"
    keys.write_text("one tenant=one\ntwo tenant=two rate=5\n")
    keys.chmod(0o600)
    arguments = ("--max-batch-size", "1", "--max-queue", "1", "--api-key-file", str(keys))
    with start(folder / "data", *arguments) as server:
        server.http.headers["Authorization"] = "Bearer one"
        assert server.upload("mine", ASSETS / "adapters" / ADAPTERS[0]).status_code == 201
        yield server


class TestFull:
    def send(self, small: Server, body: dict[str, Any]) -> tuple[int, float, httpx.Headers, Any]:
        began = time.monotonic()
        response = httpx.post(f"{small.url}/v1/generate", json=body, headers=small.http.headers, timeout=120)
        return response.status_code, time.monotonic() - began, response.headers, response.json()

    def test_spill_and_refusal(self, small: Server) -> None:
        body = {"prompt": "Once", "adapter": "mine", **LONG}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: self.send(small, body), range(8)))
        by_status = {status: [each for each in answers if each[0] == status] for status in {200, 429}}
        assert len(by_status[200]) + len(by_status[429]) == 8
        assert 2 <= len(by_status[200]) <= 4
        fastest = min(seconds for _, seconds, _, _ in by_status[200])
        for _, seconds, headers, answer in by_status[429]:
            assert answer["error"]["code"] == "overloaded"
            assert int(headers["retry-after"]) >= 1
            assert seconds < fastest, "refused at once, not when there was room"
        assert samples(small, "vblora_routed_total")["spilled"] >= 1
        assert small.http.get("/v1/adapters").status_code == 200

    def test_tenants_and_rates(self, small: Server) -> None:
        other = {"Authorization": "Bearer two"}
        refused = small.http.post("/v1/generate", json={"prompt": "Hi", "adapter": "mine"}, headers=other)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "adapter_not_found")
        assert small.http.post("/v1/generate", json={}, headers={"Authorization": "Bearer x"}).status_code == 401
        codes = [small.http.get("/v1/models", headers=other).status_code for _ in range(6)]
        assert codes == [200] * 4 + [429] * 2
