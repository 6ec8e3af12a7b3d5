"""docs/operations.md lists every metric, with its type and labels, and every field of the access log; and no other."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.api.activity import Activity
from service.api.middleware.context import RequestContext
from service.api.observation import Observation
from service.cluster.metrics import IngressMetrics
from service.engine.events import Usage
from service.engine.selection import Selection
from service.engine.sequence import GenerationRequest, SamplingParams
from service.settings import SETTINGS
from tests.fakes import FakeMetrics
from tests.unit.service.test_metrics import metrics

PAGE = (Path(__file__).parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")

Described = tuple[str, tuple[str, ...]]  # type and labels


def documented() -> Iterator[tuple[str, Described]]:
    for name, kind, labels in re.findall(r"^\| `(vblora_\w+)` \| (\w+) \| ([^|]*)\|", PAGE, re.MULTILINE):
        yield name, (kind, tuple(re.findall(r"`(\w+)`", labels)))


def exported() -> Iterator[tuple[str, Described]]:
    """Every metric of a server in which everything has happened once."""
    server = metrics()
    server.observe_request("/v1/generate", 200, 0.1)
    server.count_error("overloaded")
    server.count_generation(Selection(), "")
    server.count_usage("", Usage(1, 1))
    ingress = text_string_to_metric_families(IngressMetrics().render(2)[0])
    for family in (*ingress, *text_string_to_metric_families(server.render("")[0].decode())):
        if family.name.startswith("vblora_"):
            labels = {label: None for sample in family.samples for label in sample.labels if label != "le"}
            suffix = "_total" if family.type == "counter" else ""
            yield family.name + suffix, (family.type, tuple(labels))


def test_every_metric_is_documented_as_it_is_and_no_other() -> None:
    listed = list(documented())
    assert len(listed) == len(dict(listed)), "each once"
    assert dict(listed) == dict(exported())


@pytest.mark.parametrize("name", sorted({*re.findall(r"\bvblora_\w*[a-z]\b", PAGE)}))
def test_every_metric_that_the_page_names_exists(name: str) -> None:
    known = dict(exported())
    histograms = {f"{each}_{suffix}" for each, (kind, _) in known.items() if kind == "histogram"
                  for suffix in ("bucket", "count", "sum")}  # fmt: skip
    assert name in known or name in histograms


def field_rows() -> set[str]:
    table = PAGE.partition("| field |")[2].partition("\n\n")[0]
    return {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_every_field_of_the_access_log_is_documented() -> None:
    request = GenerationRequest("id", (1,), SamplingParams(), Selection())
    generating = set(Observation("id", [request], FakeMetrics(), Activity(), stream=False).fields())
    always = set(re.findall(r'"(\w+)": ', inspect.getsource(RequestContext._record)))
    assert {"request_id", "method", "duration_s"} <= always
    assert field_rows() == generating | always


def test_the_example_line_has_documented_fields() -> None:
    (block,) = re.findall(r"```json\n(.*)\n```", PAGE)
    assert set(json.loads(block)) - {"time", "level", "logger", "message"} <= field_rows()


def test_the_settings_that_the_page_names_exist() -> None:
    names = {setting.name for setting in SETTINGS}
    flags = {name.replace("-", "_").removeprefix("no_") for name in re.findall(r"`--([\w-]+)", PAGE)}
    assert flags <= names
    section = PAGE.partition("\n## Settings\n")[2]
    assert set(re.findall(r"`(\w+)`", section)) <= names
