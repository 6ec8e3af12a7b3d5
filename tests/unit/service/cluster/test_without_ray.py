"""`--replicas` where Ray is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from service.cli import main


def test_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ray" or name.startswith("service.cluster.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    from service.demo.run import ASSETS

    arguments = [
        "serve",
        "--model",
        str(ASSETS / "base"),
        "--replicas",
        "2",
        "--port",
        "0",
        "--data-dir",
        str(tmp_path),
    ]
    assert main(arguments) == 1
    assert "pip install 'vblora-serve[ray]'" in capsys.readouterr().err
