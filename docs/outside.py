"""A hook of MkDocs: links that leave docs/ work in the site as they do in the repository.

    [the example](../examples/train_to_serve/README.md)

A page that is linked becomes a page of the site, any other file is copied as it is. With `repo_url` set, files are
linked in the repository instead; pages are part of the site either way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
DOCS = "docs/"
KEPT = "repository/"  # where the site has what is not in docs/; SECURITY.md beside security.md needs a place of its own

_FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(?=[)\s])")


def links_in(markdown: str) -> Iterator[re.Match[str]]:
    """The links to other files; code has none. Groups: `](`, the path, `#anchor` or None."""
    fences = [match.span() for match in _FENCE.finditer(markdown)]
    for match in _LINK.finditer(markdown):
        inside = any(start <= match.start() < end for start, end in fences)
        if not inside and ":" not in match[2]:
            yield match


def target_of(page: str, link: str) -> str:
    """The file that a link of `page` names; both are paths from the repository's root."""
    return os.path.normpath(PurePosixPath(page).parent / link)


def site_path(path: str) -> str:
    """Where a file of the repository is among the site's; the README's place is the first page's."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return "index.md" if path == "README.md" else KEPT + path


def repository_path(uri: str) -> str:
    """The file of the repository that a page of the site was made from."""
    return uri.removeprefix(KEPT) if uri.startswith(KEPT) else DOCS + uri


def outside_files() -> set[str]:
    """What pages link outside of docs/, and what such pages link in turn."""
    found: set[str] = set()
    waiting = [path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / DOCS).rglob("*.md")]
    while waiting:
        page = waiting.pop()
        for match in links_in((REPOSITORY / page).read_text(encoding="utf-8")):
            target = target_of(page, match[2])
            if target.startswith(DOCS) or target == "README.md" or target in found:
                continue
            if (REPOSITORY / target).is_file():  # else MkDocs says that there is none
                found.add(target)
                waiting += [target] if target.endswith(".md") else []
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(outside_files()):
        if path.endswith(".md"):
            content = (REPOSITORY / path).read_text(encoding="utf-8")
            files.append(File.generated(config, site_path(path), content=content, inclusion=InclusionLevel.NOT_IN_NAV))
        elif not config.repo_url:
            files.append(File.generated(config, site_path(path), abs_src_path=str(REPOSITORY / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links are those of the site: from page to page, or into the repository."""
    uri = page.file.src_uri

    def in_site(match: re.Match[str]) -> str:
        target = target_of(repository_path(uri), match[2])
        path = os.path.relpath(site_path(target), PurePosixPath(uri).parent)
        if config.repo_url and site_path(target).startswith(KEPT) and not target.endswith(".md"):
            path = f"{config.repo_url.rstrip('/')}/blob/HEAD/{target}"
        return f"{match[1]}{path}{match[3] or ''}"

    for match in reversed(list(links_in(markdown))):
        markdown = markdown[: match.start()] + in_site(match) + markdown[match.end() :]
    return markdown
