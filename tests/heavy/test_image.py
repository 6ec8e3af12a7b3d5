"""Builds the CPU image and runs it, as deploy/build-image does: several minutes, 8 GB of temporary space, root."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a Debian root and to mount"),
]

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD_TIMEOUT_S = 1800


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What deploy/check_image.py saw of the image that deploy/build-image built."""
    report = tmp_path_factory.mktemp("image") / "report.json"
    argv = [REPOSITORY / "deploy" / "build-image", "--report", report]
    built = subprocess.run(argv, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return json.loads(report.read_text(encoding="utf-8"))


@pytest.fixture
def demo(seen: dict[str, Any]) -> dict[str, Any]:
    return seen["demo"]


@pytest.mark.parametrize("run", ["demo", "serve"])
def test_runs_as_its_own_user_without_any_rights(seen, run: str):
    assert seen["user"] == "10001:10001"
    assert set(seen[run]["uids"]) == {"10001"}
    assert set(seen[run]["groups"]) <= {"10001"}
    assert int(seen[run]["capabilities"], base=16) == 0


@pytest.mark.parametrize("run", ["demo", "serve"])
def test_the_server_is_process_1_and_sigterm_ends_it(seen, run: str):
    assert seen[run]["command"][-2:] == ["/opt/venv/bin/vblora-serve", run]
    assert seen[run]["stop_status"] == 0


def test_generates_with_a_read_only_root_and_no_network(demo):
    generated = demo["generated"]
    assert generated["choices"][0]["finish_reason"] in {"length", "stop"}
    assert 1 <= generated["usage"]["completion_tokens"] <= demo["prompt"]["max_new_tokens"]


def test_the_page_came_with_the_package(demo):
    assert demo["page_status"] == 200
    assert demo["page"] == (REPOSITORY / "service" / "web" / "dist" / "index.html").read_text(encoding="utf-8")


def test_is_healthy_while_it_runs_and_not_after(demo):
    assert demo["healthz"] == 200
    assert demo["healthcheck_status"] == 0
    assert demo["healthcheck_status_when_stopped"] == 1


def test_adapters_outlive_the_container(seen):
    assert seen["serve"]["adapters"]


def test_writes_to_its_volumes_alone(seen):
    assert any(path.startswith("/data/") for path in seen["written"])
    assert all(path.startswith(("/data/", "/cache/", "/tmp/")) for path in seen["written"])


def test_other_commands_pass_through(seen):
    assert seen["inspect_help_status"] == 0


def test_brings_no_cuda(seen):
    assert seen["size_bytes"] < 2e9
