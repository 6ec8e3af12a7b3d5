"""Prints what a pyproject.toml requires, one per line: `requirements.py FILE [--build | EXTRA…]`.

The image installs the dependencies in a layer of their own, before the code is there for pip to ask.
"""

import sys
import tomllib
from pathlib import Path


def main(path: str, *options: str) -> None:
    project = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    if options == ("--build",):
        print(*project["build-system"]["requires"], sep="\n")
        return
    known = project["project"]["optional-dependencies"]
    if unknown := [extra for extra in options if extra not in known]:
        sys.exit(f"there is no extra {unknown[0]!r}: there are {', '.join(known)}")
    print(*project["project"]["dependencies"], *(line for extra in options for line in known[extra]), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
