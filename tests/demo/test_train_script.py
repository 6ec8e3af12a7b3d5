"""The training script runs through, from the corpus to the card; with two steps each, it learns nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.demo.styles import STYLES

ROOT = Path(__file__).parents[2]


@pytest.mark.heavy
def test_two_steps_of_everything(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "demo" / "train.py")
    steps = ["--base-steps", "2", "--adapter-steps", "2", "--threads", "1"]
    subprocess.run(
        [sys.executable, script, "--out", str(tmp_path), *steps],
        check=True,
        capture_output=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    card = json.loads((tmp_path / "card.json").read_text())
    assert set(card["adapters"]) == set(STYLES)
    assert set(card["scores"]) == {"base", *STYLES}
    assert not list(tmp_path.rglob("adapters/*/README.md"))
    assert str(tmp_path) not in (tmp_path / "card.json").read_text()
