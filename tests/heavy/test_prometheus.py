"""Prometheus' own tools read what deploy/ has, and a Prometheus that scrapes a server answers the dashboard."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.files import ALERT_TESTS, ALERTS, SCRAPES, dashboard_expressions, read, rules
from tests.server import Server, demo_server, free_port

pytestmark = pytest.mark.heavy

PATIENCE_S = 60


def tool(name: str) -> str:
    """Where a tool is. Without it the test is skipped, but not where everything has to be tested."""
    found = shutil.which(name)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is not installed: .ci/run installs Debian's package prometheus")
        pytest.skip(f"{name} is not installed: it is in Debian's package prometheus")
    return found


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([tool("promtool"), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_rules() -> None:
    promtool("check", "rules", ALERTS)


def test_alerts_fire_and_are_silent_when_they_should() -> None:
    promtool("test", "rules", ALERT_TESTS)


def test_the_configuration_is_one() -> None:
    promtool("check", "config", SCRAPES)


def test_the_dashboard_asks_in_promql(tmp_path: Path) -> None:
    asked = dashboard_expressions()
    recorded = [{"record": f"dashboard:expression:{i}", "expr": each} for i, each in enumerate(asked)]
    file = tmp_path / "dashboard.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    assert len(asked) > 50
    promtool("check", "rules", file)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On a shared store, as the dashboard has charts of one."""
    store = f"file://{tmp_path_factory.mktemp('store')}"
    with demo_server(tmp_path_factory.mktemp("data"), "--store", store) as server:
        yield server


class Prometheus:
    """A Prometheus with the repository's configuration, but for where the server is and how often it is asked."""

    def __init__(self, folder: Path, target: str) -> None:
        config: Any = read(SCRAPES)
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"] = config["scrape_configs"][:1]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(ALERTS, folder / "alerts.yml")
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{free_port()}")
        self._command = [
            tool("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.http.base_url.host}:{self.http.base_url.port}",
        ]
        self._log = folder / "log"

    def __enter__(self) -> Prometheus:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def ask(self, expression: str) -> list[dict[str, Any]]:
        answer = self.http.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def until(self, expression: str) -> list[dict[str, Any]]:
        """What an expression answers once it answers anything."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log.read_text()
            try:
                if found := self.ask(expression):
                    return found
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.2)
        raise AssertionError(f"{expression} answered nothing: {self._log.read_text()}")


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with Prometheus(tmp_path_factory.mktemp("prometheus"), server.url.removeprefix("http://")) as prometheus:
        prometheus.until('up{job="vblora-serve"} == 1')
        # Rates need a scrape before something happens, and two scrapes after.
        for name in ("dashes", "shout", "base"):
            body = {"prompt": "Open a file and", "adapter": name, "max_new_tokens": 8, "ignore_eos": True}
            assert server.http.post("/v1/generate", json=body).status_code == 200
        prometheus.until("sum(rate(vblora_completion_tokens_total[1m])) > 0")
        yield prometheus


def test_a_scraped_server_is_seen_as_it_is(prometheus: Prometheus) -> None:
    [state] = prometheus.ask("vblora_engine_state == 1")
    assert (state["metric"]["job"], state["metric"]["state"]) == ("vblora-serve", "ready")
    [tokens] = prometheus.until("vblora_completion_tokens_total >= 24")
    assert float(tokens["value"][1]) == 24
    names = {each["metric"]["adapter"] for each in prometheus.ask("vblora_generations_total")}
    assert names == {"dashes", "shout", "base"}


@pytest.mark.parametrize("expression", dashboard_expressions())
def test_every_expression_of_the_dashboard_is_answered(prometheus: Prometheus, expression: str) -> None:
    if expression.startswith("changes("):
        assert prometheus.ask(expression) == [], "the server has started before it was scraped"
    else:
        assert prometheus.until(expression)


def test_a_server_without_trouble_raises_no_alert(prometheus: Prometheus) -> None:
    loaded = prometheus.http.get("/api/v1/rules").json()["data"]["groups"]
    assert [rule["name"] for group in loaded for rule in group["rules"] if rule["type"] == "alerting"] == [
        rule["alert"] for rule in rules() if "alert" in rule
    ]
    assert all(rule["health"] != "err" for group in loaded for rule in group["rules"])
    assert not prometheus.ask("ALERTS")
