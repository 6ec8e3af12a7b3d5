"""The documentation builds as a site without a warning, asks no other host for anything, and its links work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/README.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
FETCHED = {  # what a browser asks for by itself; `a` has links alone, which are the reader's to follow
    "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data", "link": "href",
}  # fmt: skip
ELSEWHERE = re.compile(r"^(https?:)?//")


def build(site: Path, root: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict` of a copy or of this repository, into `site`."""
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    clean = {key: value for key, value in os.environ.items() if key != "DOCS_REPO_URL"}
    return subprocess.run(
        argv, cwd=root, env=clean | {"NO_MKDOCS_2_WARNING": "1"} | environ, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stderr
    return folder


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, {key: value or "" for key, value in attrs}))


def tags(page: Path) -> list[tuple[str, dict[str, str]]]:
    return _Tags(page.read_text(encoding="utf-8")).seen


def test_every_page_is_in_the_site(site: Path) -> None:
    for path in (ROOT / "docs").glob("*.md"):
        page = site / "index.html" if path.stem == "index" else site / path.stem / "index.html"
        [title] = re.findall(r"^# (.*)", path.read_text(encoding="utf-8"))[:1]
        assert title.replace("`", "") in re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))


def test_pages_ask_no_other_host_for_anything(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        for tag, attributes in tags(page):
            if tag == "link" and attributes.get("rel") in {"canonical", "next", "prev"}:
                continue
            asked = attributes.get(FETCHED.get(tag, ""), "")
            assert not ELSEWHERE.match(asked), f"{page}: {tag} {asked}"
            assert "url(" not in attributes.get("style", "")
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), "the theme loads mermaid from a CDN"
    for sheet in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not re.search(r"(url\(|@import|href=)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_links_between_pages_lead_somewhere(site: Path) -> None:
    """As a browser follows them: also those that leave docs/, which become pages or files of the site."""
    checked = Counter[str]()
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for tag, attributes in tags(page):
            link, _, anchor = attributes.get("href", "").partition("#")
            if tag != "a" or not link or re.match(r"[a-z]+:", link):
                continue
            target = (page.parent / link).resolve()
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page}: {link}"
            assert not anchor or f'id="{anchor}"' in target.read_text(encoding="utf-8"), f"{page}: {link}#{anchor}"
            checked[target.relative_to(site).parts[0]] += 1
    assert checked["repository"] >= 3


def test_search_has_every_page_and_no_server(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert path.stem == "index" or f'"{path.stem}/' in index


def test_files_outside_are_linked_in_the_repository_if_its_address_is_known(tmp_path: Path) -> None:
    built = build(tmp_path, DOCS_REPO_URL="https://git.example/vblora-serve/")
    assert built.returncode == 0, built.stderr
    links = {attributes.get("href", "") for page in tmp_path.rglob("*.html") for _, attributes in tags(page)}
    assert "https://git.example/vblora-serve/blob/HEAD/examples/train_family.py" in links
    assert not list(tmp_path.rglob("*.py"))


# Ways to spoil a copy of the documentation, and what the build says of each.
SPOILT = {
    "a page that is not there": ("See [this](nowhere.md).", "'nowhere.md'"),
    "an anchor that is not there": ("See [this](api.md#nowhere).", "'#nowhere'"),
    "a file outside that is not there": ("See [this](../examples/nowhere.py).", "examples/nowhere.py"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_broken_link_fails_the_build(tmp_path: Path, name: str) -> None:
    added, said = SPOILT[name]
    copy = copied(tmp_path)
    page = copy / "docs" / "adapters.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n{added}\n", encoding="utf-8")
    built = build(tmp_path / "site", copy)
    assert built.returncode != 0
    assert said in built.stderr


def test_a_page_that_the_menu_lacks_fails_the_build(tmp_path: Path) -> None:
    copy = copied(tmp_path)
    (copy / "docs" / "extra.md").write_text("# Extra\n", encoding="utf-8")
    built = build(tmp_path / "site", copy)
    assert built.returncode != 0
    assert "extra.md" in built.stderr


def copied(folder: Path) -> Path:
    copy = folder / "copy"
    for name in ("docs", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.md"), ROOT / "mkdocs.yml"]:
        shutil.copy(path, copy / path.name)
    return copy


# --- on GitHub --------------------------------------------------------------------------------------


# In which theme a picture is shown, by GitHub and by the site.
OF_PICTURES = ("gh-light-mode-only", "gh-dark-mode-only")


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> Iterator[str]:
    """Those that GitHub gives a page's headings."""
    seen = Counter[str]()
    for heading in re.findall(r"^#+ +(.*?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug
        seen[slug] += 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_work_in_the_repository(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {link}"
        assert ROOT in target.parents, f"{page}: {link} leaves the repository"
        known = OF_PICTURES if target.suffix == ".png" else anchors(target)
        assert not anchor or anchor in known, f"{page}: {link}"


def test_make_docs_builds_it_strictly() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^docs:.*\n\t\$\(BIN\)/mkdocs build --strict", makefile, re.MULTILINE)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loose)
    assert config["site_dir"] == "build/site"
    assert config["theme"]["font"] is False


class _Loose(yaml.SafeLoader):
    """Reads MkDocs' own tags as nothing."""


_Loose.add_multi_constructor("!", lambda *_: None)
_Loose.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
