"""docs/architecture.md names modules that exist, and every package of the project."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MODULES = sorted(set(re.findall(r"`((?:adapters|service)\.[\w.]+|vblora_vllm)`", PAGE)))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_that_is_named_exists(module: str) -> None:
    path = ROOT.joinpath(*module.split("."))
    assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_every_package_is_named() -> None:
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("adapters", "service", "vblora_vllm")
        for path in (ROOT / top).rglob("__init__.py")
    }
    left = packages - set(MODULES) - {"adapters", "service", "service.engine", "service.api", "service.demo"}
    assert not left


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Z][a-z]+[A-Z]\w+)`", PAGE))))
def test_a_class_that_is_named_exists(name: str) -> None:
    tops = [ROOT / "adapters", ROOT / "service"]
    assert any(f"class {name}" in path.read_text(encoding="utf-8") for top in tops for path in top.rglob("*.py"))
