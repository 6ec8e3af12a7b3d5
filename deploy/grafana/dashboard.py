"""Writes vblora-serve.json, the dashboard, beside itself: python deploy/grafana/dashboard.py

Rows of panels, panels of expressions. `$job` and `$instance`, the variables at the top of the page, choose servers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("vblora-serve.json")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
CHOICE = 'job=~"$job", instance=~"$instance"'
RATE = "[$__rate_interval]"
SCHEMA = 39  # of Grafana 11; newer ones migrate it when they load it
WIDTH, HEIGHT = 24, 8


@dataclass(frozen=True)
class Panel:
    """One panel: `queries` are (expression, legend); `width` is in 24ths of the page."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    text: str = ""
    stacked: bool = False


def rate(metric: str, by: str = "instance", only: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{CHOICE}{only and ', ' + only}}}{RATE}))"


def gauge(metric: str, by: str = "instance") -> str:
    return f"sum by ({by}) ({metric}{{{CHOICE}}})"


def quantiles(metric: str) -> list[tuple[str, str]]:
    buckets = rate(f"{metric}_bucket", "le")
    return [(f"histogram_quantile({q}, {buckets})", f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99)]


def mean(metric: str) -> str:
    return f"{rate(f'{metric}_sum')} / {rate(f'{metric}_count')}"


def heatmap(title: str, metric: str) -> Panel:
    buckets = f"sum by (le) (increase({metric}_bucket{{{CHOICE}}}{RATE}))"
    return Panel(title, [(buckets, "{{le}}")], "s", "heatmap")


def latency(title: str, metric: str, text: str = "") -> list[Panel]:
    return [Panel(title, quantiles(metric), "s", text=text, width=8), heatmap(f"{title}: distribution", metric)]


def share(part: str, rest: str) -> str:
    return f"{rate(part)} / ({rate(part)} + {rate(rest)})"


ROWS: Sequence[tuple[str, Sequence[Panel]]] = [
    ("State", [
        Panel("Up", [(f"up{{{CHOICE}}}", "{{instance}}")], "bool_yes_no", "stat", 4),
        Panel("Engine", [(f"vblora_engine_state{{{CHOICE}}} == 1", "{{instance}} {{state}}")], "none", "stat", 5),
        Panel("Running for", [(f"time() - process_start_time_seconds{{{CHOICE}}}", "{{instance}}")], "s", "stat", 5),
        Panel("Adapters registered", [(gauge("vblora_adapters"), "{{instance}}")], kind="stat", width=5),
        Panel("Alerts firing", [('count(ALERTS{alertname=~"Vblora.*", alertstate="firing"}) or vector(0)', "")],
              kind="stat", width=5),
    ]),
    ("Traffic and errors", [
        Panel("Responses by route", [(rate("vblora_requests_total", "route"), "{{route}}")], "reqps"),
        Panel("Responses by status", [(rate("vblora_requests_total", "status"), "{{status}}")], "reqps", stacked=True),
        Panel("Errors by code", [(rate("vblora_errors_total", "code"), "{{code}}")], "reqps", stacked=True,
              text="overloaded: the queue was full. internal_error, engine_unavailable, adapter_unavailable, "
                   "store_unavailable and storage_full are the server's faults; the others are clients'."),
        Panel("Tokens", [(rate("vblora_completion_tokens_total"), "{{instance}} generated"),
                         (rate("vblora_prompt_tokens_total"), "{{instance}} of prompts, run"),
                         (rate("vblora_prefix_tokens_total"), "{{instance}} of prompts, cached")]),
        Panel("Choices that ended", [(rate("vblora_finished_choices_total", "reason"), "{{reason}}")], stacked=True),
        Panel("Time of a response, p95",
              [(f"histogram_quantile(0.95, {rate('vblora_request_seconds_bucket', 'le, route')})", "{{route}}")], "s"),
    ]),
    ("Latency", [
        *latency("First token", "vblora_time_to_first_token_seconds", "Waiting and a cold adapter's loading included."),
        Panel("Generations", [(rate("vblora_generation_seconds_count"), "{{instance}}")], "reqps",
              text="Requests that ran to their end."),
        *latency("Between tokens", "vblora_inter_token_latency_seconds", "Between two tokens of one choice."),
        Panel("Whole generation", quantiles("vblora_generation_seconds"), "s"),
        *latency("Queue", "vblora_queue_seconds", "From submission to the first step."),
        Panel("First token, mean", [(mean("vblora_time_to_first_token_seconds"), "{{instance}}")], "s"),
    ]),
    ("Batch and queue", [
        Panel("Sequences that wait", [(gauge("vblora_queue_depth"), "{{instance}}")]),
        Panel("Sequences that run", [(gauge("vblora_running_sequences"), "{{instance}}")]),
        Panel("Adapters in the batch", [(gauge("vblora_batch_adapters"), "{{instance}}")]),
        Panel("Decode steps on CUDA graphs", [(rate("vblora_replayed_steps_total"), "{{instance}} replayed"),
                                              (rate("vblora_eager_steps_total"), "{{instance}} eager")], "ops"),
    ]),
    ("Adapters", [
        Panel("Requests by adapter", [(f"topk(15, {rate('vblora_generations_total', 'adapter')})", "{{adapter}}")],
              "reqps", width=12, text="The 15 most used. other: those beyond the first 100, and other tenants'."),
        Panel("Found in memory", [(share("vblora_adapter_hits_total", "vblora_adapter_misses_total"), "{{instance}}")],
              "percentunit", width=12),
        Panel("Hits, misses, evictions", [(rate("vblora_adapter_hits_total"), "{{instance}} hits"),
                                          (rate("vblora_adapter_misses_total"), "{{instance}} misses"),
                                          (rate("vblora_adapter_evictions_total"), "{{instance}} evictions")], "ops"),
        Panel("Composes", [(rate("vblora_adapter_composes_total"), "{{instance}}")], "ops"),
        Panel("Time to compose one", [
            (f"{rate('vblora_adapter_compose_seconds_total')} / {rate('vblora_adapter_composes_total')}",
             "{{instance}}")], "s"),
        Panel("Memory", [(gauge("vblora_adapter_resident_bytes", "instance, kind"), "{{instance}} {{kind}}")], "bytes",
              width=12, text="compact: as stored. factors: as they run, bounded by --adapter-memory."),
        Panel("Versions by state", [(gauge("vblora_adapter_versions", "instance, state"), "{{instance}} {{state}}")],
              width=12),
        Panel("Shared store: since its last answer", [(gauge("vblora_store_refresh_age_seconds"), "{{instance}}")],
              "s", width=12, text="With --store alone. What others change is seen when it answers."),
        Panel("Shared store: failures", [(rate("vblora_store_errors_total"), "{{instance}}")], "ops", width=12),
    ]),
    ("Memory for keys and values", [
        Panel("Of --kv-memory", [(gauge("vblora_kv_bytes"), "{{instance}} running sequences"),
                                 (gauge("vblora_prefix_bytes"), "{{instance}} prefix cache"),
                                 (gauge("vblora_kv_budget_bytes"), "{{instance}} budget")], "bytes"),
        Panel("Prompt tokens found in the prefix cache",
              [(share("vblora_prefix_tokens_total", "vblora_prompt_tokens_total"), "{{instance}}")], "percentunit"),
        Panel("Blocks dropped from the prefix cache", [(rate("vblora_prefix_evicted_blocks_total"), "{{instance}}")],
              "ops"),
    ]),
    ("Folds", [
        Panel("Folds and restores", [(rate("vblora_folds_total"), "{{instance}} folds"),
                                     (rate("vblora_restores_total"), "{{instance}} restores")], "ops", width=12),
        Panel("Share of the time spent on them", [(rate("vblora_fold_seconds_total"), "{{instance}} folds"),
                                                  (rate("vblora_restore_seconds_total"), "{{instance}} restores")],
              "percentunit", width=12),
    ]),
    ("Process", [
        Panel("Resident memory", [(gauge("process_resident_memory_bytes"), "{{instance}}")], "bytes"),
        Panel("CPU seconds a second", [(rate("process_cpu_seconds_total"), "{{instance}}")]),
        Panel("File descriptors", [(gauge("process_open_fds"), "{{instance}} open"),
                                   (gauge("process_max_fds"), "{{instance}} at most")]),
    ]),
]  # fmt: skip


def target(number: int, expression: str, legend: str, kind: str) -> dict[str, Any]:
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expression,
        "format": "heatmap" if kind == "heatmap" else "time_series",
        "instant": kind == "stat",
        "range": kind != "stat",
        "legendFormat": legend,
        "refId": chr(ord("A") + number),
    }


def drawn(panel: Panel) -> dict[str, Any]:
    """What depends on the kind of panel: the options, and how fields are shown."""
    if panel.kind == "heatmap":
        return {
            "fieldConfig": {"defaults": {}, "overrides": []},
            "options": {
                "calculate": False,
                "cellGap": 1,
                "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5, "fill": "dark-orange"},
                "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
                "tooltip": {"mode": "single", "yHistogram": False},
                "legend": {"show": True},
            },
        }
    if panel.kind == "stat":
        engine = panel.title == "Engine"
        return {
            "fieldConfig": {"defaults": {"unit": panel.unit, "color": {"mode": "thresholds"}}, "overrides": []},
            "options": {
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                "textMode": "name" if engine else "value_and_name",
                "colorMode": "none",
                "graphMode": "none",
            },
        }
    custom = {
        "drawStyle": "line",
        "fillOpacity": 30 if panel.stacked else 10,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
    }
    return {
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def panels() -> Iterator[dict[str, Any]]:
    """Every row and panel, placed left to right and top to bottom."""
    number, x, y = 1, 0, 0
    for title, row in ROWS:
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y},
            "panels": [],
        }
        number, x, y = number + 1, 0, y + 1
        height = 4 if row[0].kind == "stat" else HEIGHT
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            yield {
                "id": number,
                "type": panel.kind,
                "title": panel.title,
                "description": panel.text,
                "datasource": DATASOURCE,
                "gridPos": {"h": height, "w": panel.width, "x": x, "y": y},
                "targets": [target(i, *query, panel.kind) for i, query in enumerate(panel.queries)],
                **drawn(panel),
            }
            number, x = number + 1, x + panel.width
        y += height


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # when the time range changes
        "includeAll": True,
        "multi": True,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "sort": 1,
    }


def dashboard() -> dict[str, Any]:
    source = {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus", "current": {}}
    return {
        "uid": "vblora-serve",
        "title": "vblora-serve",
        "description": "One or more servers of VB-LoRA adapters. What each metric means: docs/operations.md.",
        "tags": ["vblora-serve"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                source,
                variable("job", "Job", "label_values(vblora_queue_depth, job)"),
                variable("instance", "Server", 'label_values(vblora_queue_depth{job=~"$job"}, instance)'),
            ]
        },
        "annotations": {
            "list": [
                {
                    "name": "Starts",
                    "datasource": DATASOURCE,
                    "enable": True,
                    "iconColor": "blue",
                    "expr": f"changes(process_start_time_seconds{{{CHOICE}}}[2m]) > 0",
                    "titleFormat": "{{instance}} has started",
                }
            ]
        },
        "panels": list(panels()),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=2) + "\n", encoding="utf-8")
