"""What the wheel holds: the page as it is served, and nothing that it is built from."""

from __future__ import annotations

import shutil
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVED = {"service/web/dist/index.html", "service/web/dist/assets/index-1a2b.js"}
SOURCES = {"service/web/package.json", "service/web/src/main.ts", "service/web/node_modules/x/index.js"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project's own files, with a page that is built and its sources beside it."""
    config: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for name in (*config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("web", "__pycache__", "assets"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
    for name in SERVED | SOURCES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_the_wheel_brings_the_page_and_not_its_sources(project: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")  # what builds it, from the extra dev
    (built,) = wheel.WheelBuilder(str(project)).build(directory=str(project / "built"), versions=["standard"])
    names = set(zipfile.ZipFile(built).namelist())
    assert {name for name in names if name.startswith("service/web/")} == SERVED
    assert names > {"service/app.py", "adapters/compose.py", "service/py.typed"}


def test_the_package_that_runs_has_a_page() -> None:
    page = (ROOT / "service" / "web" / "dist" / "index.html").read_text()
    assert "<title>" in page
