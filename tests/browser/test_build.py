"""The page that is committed is what its sources give."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.page_build import DIST, build, differing, prepare, run, tool

MOST_BYTES = 300_000


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("page"))


def test_the_committed_page_is_what_the_sources_build(sources: Path) -> None:
    assert differing(build(sources), DIST) == [], "run make page"


def test_the_sources_are_formatted(sources: Path) -> None:
    run(sources, tool("npm", "run", "check"))


def test_the_scripts_pass_their_tests(sources: Path) -> None:
    assert "# fail 0" in run(sources, tool("node", "--test", "--test-reporter=tap", "test/*.test.ts"))


def test_the_page_is_small_and_asks_nobody_else() -> None:
    files = [path for path in DIST.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    html = (DIST / "index.html").read_text()
    assert "://" not in html
    assert all(path.suffix in {".html", ".js", ".css", ".svg"} for path in files)


def test_a_file_that_differs_is_noticed(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "same").write_text("same")
    (one / "changed").write_text("1")
    (other / "changed").write_text("2")
    (other / "new").write_text("")
    assert differing(one, other) == ["changed", "new"]
