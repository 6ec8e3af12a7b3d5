"""The dashboard and the alerts speak of metrics that a server shows, and of all of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from service.api.errors import STATUS
from service.engine.seam import EngineState
from service.metrics import WATCHED_ERRORS
from tests.deploy.files import (
    ALERT_TESTS,
    DASHBOARD,
    DEPLOY,
    KUBERNETES,
    ROOT,
    SCRAPES,
    dashboard_expressions,
    metric_names,
    named_in,
    panels,
    read,
    rules,
)

ALERT_RULES = [rule for rule in rules() if "alert" in rule]
# On no dashboard: they tell of tenants, and are shown to keys alone.
LEFT_OUT = {name for name in metric_names() if name.startswith("vblora_tenant_")}
OF_AN_INGRESS = {"vblora_replicas", "vblora_replicas_lost_total", "vblora_routed_total"}  # one server has none


def test_the_dashboard_is_what_its_script_writes() -> None:
    code = "import dashboard, json; print(json.dumps(dashboard.dashboard(), indent=2))"
    done = subprocess.run([sys.executable, "-c", code], cwd=DEPLOY / "grafana", capture_output=True, text=True)
    assert done.stdout == DASHBOARD.read_text(encoding="utf-8"), done.stderr


@pytest.mark.parametrize("expression", [*dashboard_expressions(), *(rule["expr"] for rule in rules())])
def test_expressions_name_metrics_that_exist(expression: str) -> None:
    assert named_in(expression) <= metric_names()


def test_every_metric_is_on_the_dashboard_or_left_out_on_purpose() -> None:
    shown = set().union(*map(named_in, dashboard_expressions()))
    ours = {name for name in metric_names() if name.startswith("vblora_")}
    assert len(LEFT_OUT) == 3
    assert ours - shown == LEFT_OUT | OF_AN_INGRESS


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_panel_asks_the_chosen_source_for_the_chosen_servers() -> None:
    variables = {each["name"]: each for each in json.loads(DASHBOARD.read_text())["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert {"job", "instance"} <= set(variables)
    for panel in panels():
        for target in panel["targets"]:
            assert panel["datasource"] == target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            about = "ALERTS" in target["expr"] or 'job=~"$job", instance=~"$instance"' in target["expr"]
            assert about, target["expr"]


def test_the_provisioned_source_and_folder_are_those_of_compose() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = read(provisioning / "datasources" / "prometheus.yml")["datasources"]
    [provider] = read(provisioning / "dashboards" / "vblora-serve.yml")["providers"]
    services = read(ROOT / "compose.yaml")["services"]
    mounted = {each.split(":")[0]: each.split(":")[1] for each in services["grafana"]["volumes"]}
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    assert mounted["./deploy/grafana/vblora-serve.json"].startswith(provider["options"]["path"] + "/")


@pytest.mark.parametrize("rule", ALERT_RULES, ids=lambda rule: rule["alert"])
def test_every_alert_says_how_bad_what_and_where_to_read_on(rule: dict) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^### (\w+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor == rule["alert"].lower()
    assert rule["alert"] in headings


def test_the_runbook_has_no_other_alerts() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bVblora[A-Z]\w+", page)) == {rule["alert"] for rule in ALERT_RULES}


@pytest.mark.parametrize("rule", ALERT_RULES, ids=lambda rule: rule["alert"])
def test_every_alert_is_seen_to_fire_and_to_be_silent(rule: dict) -> None:
    cases = [each for test in read(ALERT_TESTS)["tests"] for each in test["alert_rule_test"]]
    expected = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]]
    assert {True, False} == set(expected)


def test_labels_that_alerts_ask_for_exist() -> None:
    text = "\n".join(rule["expr"] for rule in rules())
    codes = {code for group in re.findall(r'code=~?"([^"]+)"', text) for code in group.split("|")}
    states = {
        state for group in re.findall(r'vblora_engine_state\{state=~?"([^"]+)"', text) for state in group.split("|")
    }
    assert codes <= set(WATCHED_ERRORS) <= set(STATUS), "a series that begins at 1 shows no increase"
    assert set(states) <= {state.name.lower() for state in EngineState}


def test_prometheus_scrapes_the_server_under_a_name_that_alerts_know() -> None:
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in read(SCRAPES)["scrape_configs"]}
    assert jobs["vblora-serve"] == ["vblora-serve:8000"]
    assert [name for name in jobs if name.startswith("vblora")] == ["vblora-serve"]


def test_the_operator_gets_the_same_rules() -> None:
    rule = read(KUBERNETES / "monitoring" / "prometheusrule.yaml")
    assert rule["spec"] == read(DEPLOY / "prometheus" / "alerts.yml")


def test_recorded_names_that_are_used_are_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for rule in ALERT_RULES for name in re.findall(r"\bjob_instance:[\w:]+", rule["expr"])}
    assert used == recorded
