"""docs/deployment.md names what there is, and what is deployed names no host of somebody's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.api.keys import load_key_file
from service.cli import main
from tests.deploy.files import COMPOSE, DEPLOY, ROOT

PAGE = ROOT / "docs" / "deployment.md"
TEXT = PAGE.read_text(encoding="utf-8")
OWN = {"127.0.0.1", "localhost", "prometheus"}
DEPLOYED = [PAGE, *COMPOSE]
for part in ("grafana", "kubernetes", "prometheus"):
    DEPLOYED += (path for path in sorted((DEPLOY / part).rglob("*.*")) if path.suffix != ".pyc")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"deploy/[\w/.-]*\w|compose[\w.]*\.yaml", TEXT))))
def test_files_that_the_page_names_exist(name: str) -> None:
    assert (ROOT / name).exists() or name == "compose.override.yaml"


def test_the_page_lists_the_variables_of_the_compose_files() -> None:
    used = {name for path in COMPOSE for name in re.findall(r"\$\{(\w+)", path.read_text(encoding="utf-8"))}
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == used


def test_the_command_that_makes_a_key_makes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [command] = re.findall(r"^vblora-serve (key .*?)\s*#", TEXT, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 0
    assert [key.tenant for key in load_key_file(tmp_path / "api-keys")] == ["acme"]


@pytest.mark.parametrize("path", DEPLOYED, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_no_host(path: Path) -> None:
    assert set(re.findall(r"https?://([\w.-]+)", path.read_text(encoding="utf-8"))) <= OWN
