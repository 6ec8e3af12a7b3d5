"""compose.yaml follows its schema, and agrees with the image, the settings and the files of this repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.files import COMPOSE, LAST_WORDS_S, ROOT, VARIABLES, dockerfile, read, settings_of

SERVICES: dict[str, Any] = read(COMPOSE[0])["services"]
SERVER = SERVICES["vblora-serve"]
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def seconds(duration: str) -> int:
    return int(duration[:-1]) * _SECONDS[duration[-1]]


def filled(text: str) -> str:
    """With every variable of the file at its default."""
    return re.sub(r"\$\{\w+(?::-([^}]*))?\}", lambda match: match[1] or "", text)


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_follows_the_schema(path: Path) -> None:
    argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", path]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_notices_a_mistake(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE[0].read_text().replace("read_only: true", "readonly: true"))
    argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", wrong]
    assert "readonly" in subprocess.run(argv, capture_output=True, text=True).stdout


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_its_variables_are_settings_that_can_be_read(path: Path) -> None:
    environment = read(path)["services"]["vblora-serve"]["environment"]
    ours = {name: filled(value) for name, value in environment.items() if name.startswith("VBLORA_")}
    assert set(ours) <= VARIABLES
    settings_of(ours)


@pytest.mark.parametrize("name", SERVICES)
def test_mounts_exist_here_or_are_volumes(name: str) -> None:
    volumes = read(COMPOSE[0])["volumes"]
    for mount in SERVICES[name]["volumes"]:
        source = mount.split(":")[0]
        assert (ROOT / source).exists() if source.startswith("./") else source in volumes, mount


@pytest.mark.parametrize("name", SERVICES)
def test_runs_without_rights_and_within_limits(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert service["healthcheck"]["test"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_server_is_the_images() -> None:
    assert filled(SERVER["ports"][0]) == f"127.0.0.1:8000:{dockerfile('EXPOSE')}"
    command = re.search(r"CMD (\[.*\])", dockerfile("HEALTHCHECK"))
    assert command is not None
    assert ["CMD", *read_list(command[1])] == SERVER["healthcheck"]["test"]
    mounted = {volume.split(":")[1] for volume in SERVER["volumes"]}
    assert mounted == set(read_list(dockerfile("VOLUME")))


def read_list(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text)


def test_build_arguments_are_the_dockerfiles() -> None:
    known = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for path in COMPOSE:
        assert set(read(path)["services"]["vblora-serve"]["build"]["args"]) <= known


def test_a_stop_waits_until_the_server_has_drained() -> None:
    drain = settings_of({"VBLORA_DRAIN_TIMEOUT_S": SERVER["environment"]["VBLORA_DRAIN_TIMEOUT_S"]}).drain_timeout_s
    assert seconds(SERVER["stop_grace_period"]) > drain + LAST_WORDS_S


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_other_images_are_named_without_a_registry_and_with_a_version(name: str) -> None:
    assert re.fullmatch(r"[\w-]+/[\w-]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


def test_the_head_of_the_file_names_its_variables() -> None:
    text = "".join(path.read_text() for path in COMPOSE)
    used = set(re.findall(r"\$\{(\w+)", text))
    head = re.search(r"# Variables of this file.*?: (.*?)\.", COMPOSE[0].read_text().replace("\n# ", " "), re.DOTALL)
    assert head is not None
    assert set(re.findall(r"\b[A-Z_]{5,}\b", head[1])) == used
