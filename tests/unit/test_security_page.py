"""docs/security.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_is_named_exists() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if ".py`" in row]
    assert len(rows) > 10
    for row in rows:
        folder = Path()
        for name in re.findall(r"`([\w/]+\.py)`", row):
            path = Path(name)
            folder = path.parent if len(path.parts) > 1 else folder  # a bare name is in the folder of the one before
            assert (ROOT / "tests" / folder / path.name).is_file(), name
