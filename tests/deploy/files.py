"""What the tests of deploy/ read: the files, parsed, and what a server is made of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from service.commands import serve
from service.settings import CONFIG_VARIABLE, SETTINGS, Settings, load_settings
from tests.unit.service.test_metrics import metrics
from tests.unit.service.test_operations_doc import exported

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
ALERT_TESTS = DEPLOY / "prometheus" / "alerts.test.yml"
SCRAPES = DEPLOY / "prometheus" / "prometheus.yml"
DASHBOARD = DEPLOY / "grafana" / "vblora-serve.json"
COMPOSE = [ROOT / "compose.yaml", ROOT / "compose.gpu.yaml"]
LAST_WORDS_S = serve._LAST_WORDS_S
VARIABLES = {setting.variable for setting in SETTINGS} | {CONFIG_VARIABLE}

_WORD = re.compile(r"\b(vblora_\w+|process_\w+)\b")
_SERIES = ("_bucket", "_count", "_sum")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def documents(folder: Path) -> dict[str, Any]:
    """The manifests of a folder by kind, one of each, without what is only kustomize's."""
    found = {path.name: read(path) for path in sorted(folder.glob("*.yaml")) if path.name != "kustomization.yaml"}
    by_kind = {document["kind"]: document for document in found.values()}
    assert len(by_kind) == len(found)
    return by_kind


def dockerfile(instruction: str) -> str:
    """The arguments of the Dockerfile's last such instruction, continuation lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^{instruction}\s+(.*?)\s*$", text, re.MULTILINE)[-1]


def settings_of(environ: dict[str, str]) -> Settings:
    """The settings as a server with these variables has them: raises if one is unknown or cannot be read."""
    return load_settings({}, environ=environ)


def metric_names() -> set[str]:
    """Every metric that a server shows, ours and the process's, as expressions name them."""
    return {name for name, _ in exported()} | process_names()


def process_names() -> set[str]:
    return set(re.findall(r"^(process_\w+) ", metrics().render()[0].decode(), re.MULTILINE))


def named_in(expression: str) -> set[str]:
    """The metrics that an expression names; recorded ones, which have colons, aside."""
    plain = re.sub(r"\w+:[\w:]+|\"[^\"]*\"", "", expression)
    return {_metric(word) for word in _WORD.findall(plain)}


def _metric(series: str) -> str:
    """A histogram's name, of one of its series."""
    for suffix in _SERIES:
        if series.endswith(suffix):
            return series.removesuffix(suffix)
    return series


def rules() -> list[dict[str, Any]]:
    return [rule for group in read(ALERTS)["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> list[str]:
    """What the dashboard asks of Prometheus, its variables filled in."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    asked += [each["expr"] for each in dashboard["annotations"]["list"]]
    return [filled(each) for each in asked]


def filled(expression: str) -> str:
    for name, value in {"$__rate_interval": "1m", "$job": "vblora-serve", "$instance": ".*"}.items():
        expression = expression.replace(name, value)
    return expression
