"""Runs the pages of the documentation, or records anew what their commands answer:

python -m tests.documented_pages --record README.md docs/api.md
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.cli import make_parser
from service.cli.settings_flags import settings_of
from tests.documented import VOLATILE, Command, commands_in, differences, shown
from tests.documented_blocks import SERVES, Block, blocks_of, elsewhere, own_server
from tests.documented_elsewhere import PRELUDES
from tests.server import ASSETS, ROOT, Server, demo_server

DOCUMENTED_URL = "http://127.0.0.1:8000"
TRAINS = {"docs/train.md"}  # its adapter is trained as the page runs, and never twice to the same bytes
TRAINED = {"digest"}


@dataclass
class Run:
    """The commands of one page, run in order in `folder`, with `server` at the documented address."""

    page: str
    folder: Path
    server: Server | None
    namespace: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.page in PRELUDES:
            self.python(PRELUDES[self.page])

    def block(self, block: Block) -> None:
        """Runs what of a block is not left to another test; of a console block the answers must be those shown."""
        if block.language == "console":
            for command in commands_in(block.text):
                if elsewhere(self.page, command.text) is None:
                    wrong = self.differences(command, self.answer(command))
                    assert not wrong, "\n".join([f"{self.page}: {command.text}", *wrong])
            return
        for command in block.runs():
            (self.sh if block.language == "sh" else self.python)(command)

    def differences(self, command: Command, answer: str) -> list[str]:
        return differences(command.answer, answer, VOLATILE | TRAINED if self.page in TRAINS else VOLATILE)

    def answer(self, command: Command) -> str:
        """What a command of a console block prints, with the documented address in place of the real one."""
        done = self._bash(command.text)
        printed = (done.stdout + done.stderr).rstrip("\n")
        return printed if self.server is None else printed.replace(self.server.url, DOCUMENTED_URL)

    def sh(self, command: str) -> None:
        """Runs a command, which must succeed. What starts a server is read alone: the page's server runs already."""
        if command.startswith(SERVES):
            with chdir(self.folder):  # where a --config of the page lies
                settings_of(make_parser().parse_args(shlex.split(command, comments=True)[1:]))
            return
        done = self._bash(command)
        assert done.returncode == 0, f"{self.page}: {command}\n{done.stdout}{done.stderr}"

    def python(self, code: str) -> None:
        with chdir(self.folder):
            exec(compile(self._here(code), self.page, "exec"), self.namespace)

    def _bash(self, command: str) -> subprocess.CompletedProcess[str]:
        """In a shell in which the environment is activated."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environ = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        argv = ["bash", "-o", "pipefail", "-c", self._here(command)]
        return subprocess.run(argv, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=120)

    def _here(self, text: str) -> str:
        return text if self.server is None else text.replace(DOCUMENTED_URL, self.server.url)


def workplace(folder: Path, data: Path) -> Path:
    """The working directory of the commands: adapters, a base, and the server's data by the names that pages use."""
    (folder / "DATA_DIR").symlink_to(data)
    (folder / "BACKUP").mkdir()
    adapters = sorted((ASSETS / "adapters").iterdir())
    for name, adapter in zip(("my-adapter", "A", "B"), adapters, strict=False):
        shutil.copytree(adapter, folder / name)  # a copy: a page may write to it
    (folder / "path" / "to").mkdir(parents=True)
    for base in ("base", "path/to/base"):
        (folder / base).symlink_to(ASSETS / "base")
    (folder / "service").symlink_to(ROOT / "service")
    return folder


@contextmanager
def opened(page: str, place: Path) -> Iterator[Run]:
    """A page ready to run: its working directory and, if it asks one, its server. Both are new, below `place`."""
    folder = place / "work"
    folder.mkdir()
    with ExitStack() as stack:
        server = None
        if any(DOCUMENTED_URL in command for block in blocks_of(page) for command in block.runs()):
            start = own_server(page)
            fresh = (
                demo_server(place / "data", "--allow-source", str(folder))
                if start is None
                else Server(*start, data_dir=place / "data")
            )
            server = stack.enter_context(fresh)
        yield Run(page, workplace(folder, place / "data"), server)


def record(page: str) -> None:
    """Writes what each command answers below it, where that is no longer right."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place, opened(page, Path(place)) as run:
        done = [(block.span, _recorded(run, block)) for block in blocks_of(page)]
    for (start, end), block in reversed(done):
        text = text[:start] + (block or text[start:end]) + text[end:]
    path.write_text(text, encoding="utf-8")


def _recorded(run: Run, block: Block) -> str | None:
    """A console block with its answers; None for others, which are run."""
    if block.language != "console":
        run.block(block)
        return None
    answered = []
    for command in commands_in(block.text):
        answer = run.answer(command)
        right = not run.differences(command, answer)
        answered.append(f"$ {command.text}\n{command.answer if right else shown(answer)}".rstrip())
    return "```console\n" + "\n".join(answered) + "\n```"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--record", nargs="+", required=True, metavar="PAGE")
    for page in parser.parse_args().record:
        record(page)
