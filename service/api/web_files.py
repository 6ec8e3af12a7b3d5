"""The built page as the package has it: read once, served from memory, identified by content.

Names are looked up among those that were found, so that no path leads anywhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath

INDEX = "index.html"
ASSETS = "assets"

# Not what the machine's own table says: a script of another type is not run.
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class WebFile:
    """One file of the page. `etag` is of its content: built files may all have one date."""

    content: bytes
    media_type: str
    etag: str


@cache
def web_files() -> Mapping[str, WebFile]:
    """The files by path: the index, and whatever is in the assets' folder."""
    folder = files("service") / "web" / "dist"
    found = {INDEX: _read(folder / INDEX)}
    assets = folder / ASSETS
    if assets.is_dir():
        found.update((f"{ASSETS}/{file.name}", _read(file)) for file in assets.iterdir() if file.is_file())
    return found


def _read(file: Traversable) -> WebFile:
    content = file.read_bytes()
    media_type = _MEDIA_TYPES.get(PurePosixPath(file.name).suffix, "application/octet-stream")
    return WebFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
