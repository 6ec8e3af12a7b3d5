"""Prints what a pyproject.toml requires, one per line: `requirements.py FILE [--build]`.

The image installs the dependencies in a layer of their own, before the code is there for pip to ask.
"""

import sys
import tomllib
from pathlib import Path


def main(path: str, *options: str) -> None:
    project = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    build = options == ("--build",)
    print(*(project["build-system"]["requires"] if build else project["project"]["dependencies"]), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
