"""What can be known of the image without building it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from service.settings import CONFIG_VARIABLE, SETTINGS

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
FILES = [
    *(REPOSITORY / name for name in ("Dockerfile", ".dockerignore", "docs/docker.md")),
    *(DEPLOY / name for name in ("build-image", "check_image.py", "entrypoint", "healthcheck.py", "requirements.py")),
]


def instructions(name: str) -> list[str]:
    """The arguments of every `name` in the Dockerfile, continuation lines joined."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^{name}\s+(.*?)\s*$", text, re.MULTILINE)


def environment() -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", instructions("ENV")[-1]))


class TestDockerfile:
    def test_runs_as_a_numbered_user_that_is_not_root(self):
        user, group = instructions("USER")[-1].split(":")
        assert int(user) > 0
        assert int(group) > 0

    def test_only_its_base_image_comes_from_outside(self):
        bases = [line.split() for line in instructions("FROM")]
        stages = {base[2] for base in bases if "AS" in base}
        assert {base[0] for base in bases} <= stages | {"scratch", "${BASE_IMAGE}"}

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
    def test_names_no_host(self, path: Path):
        hosts = re.findall(r"https?://([\w.-]+)", path.read_text(encoding="utf-8"))
        assert set(hosts) <= {"127.0.0.1", "localhost"}

    def test_base_image_is_whatever_registry_the_engine_uses(self):
        [default] = [line.split("=", 1)[1] for line in instructions("ARG") if line.startswith("BASE_IMAGE=")]
        assert "/" not in default

    @pytest.mark.parametrize("variable", [name for name in environment() if name.startswith("VBLORA_")])
    def test_its_variables_are_settings(self, variable: str):
        assert variable in {setting.variable for setting in SETTINGS}

    def test_every_copied_file_is_there_and_not_ignored(self):
        lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
        kept = {line[1:] for line in lines if line.startswith("!")}
        sources = [source for line in instructions("COPY") if "--from" not in line for source in line.split()[:-1]]
        for source in sources:
            name = source.rstrip("/").replace("[t]", "t")
            assert name in kept, f"{name} is not in .dockerignore"
            assert "[" in source or (REPOSITORY / name).exists()

    def test_torch_is_the_constrained_one(self):
        constraints = REPOSITORY / "constraints.txt"
        [version] = [line.split("=", 1)[1] for line in instructions("ARG") if line.startswith("TORCH_VERSION=")]
        pinned = re.search(r"^torch==([\w.]+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
        assert pinned is not None
        assert pinned[1] == version


class TestEntrypoint:
    @pytest.fixture
    def run(self, tmp_path: Path):
        """Runs the entry point with a `vblora-serve` that says how it was called."""
        command = tmp_path / "vblora-serve"
        command.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
        command.chmod(0o755)

        def run(*arguments: str, **variables: str) -> str:
            environ = {"PATH": f"{tmp_path}:{os.defpath}", **variables}
            argv = [str(DEPLOY / "entrypoint"), *arguments]
            return subprocess.run(argv, env=environ, check=True, capture_output=True, text=True).stdout.strip()

        return run

    def test_is_the_demo_until_a_model_is_named(self, run):
        assert run() == "demo"
        assert run(VBLORA_MODEL="", VBLORA_CONFIG="") == "demo"

    @pytest.mark.parametrize("variable", ["VBLORA_MODEL", CONFIG_VARIABLE])
    def test_serves_once_a_model_is_named(self, run, variable: str):
        assert run(**{variable: "/models/base"}) == "serve"

    def test_options_alone_are_for_serve(self, run):
        assert run("--model", "/models/base") == "serve --model /models/base"

    @pytest.mark.parametrize("option", ["--help", "--version"])
    def test_questions_about_the_command_are_not_for_serve(self, run, option: str):
        assert run(option) == option

    @pytest.mark.parametrize("command", ["serve", "demo", "inspect", "doctor"])
    def test_commands_pass_through(self, run, command: str):
        assert run(command, "DIR", "--flag", VBLORA_MODEL="/models/base") == f"{command} DIR --flag"


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class TestHealthcheck:
    @pytest.fixture
    def port(self) -> Iterator[int]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Healthy)
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()
        server.server_close()

    def check(self, **variables: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(DEPLOY / "healthcheck.py")]
        return subprocess.run(argv, env=variables, capture_output=True, text=True, timeout=30)

    def test_passes_when_the_server_answers(self, port: int):
        assert self.check(VBLORA_PORT=str(port)).returncode == 0

    def test_asks_no_proxy(self, port: int):
        assert self.check(VBLORA_PORT=str(port), http_proxy="http://127.0.0.1:1").returncode == 0

    def test_fails_and_says_why_when_nothing_answers(self):
        done = self.check(VBLORA_PORT="1")
        assert done.returncode == 1
        assert "refused" in done.stderr

    def test_passes_over_the_address_kubernetes_gives_a_service(self):
        done = self.check(VBLORA_PORT="tcp://10.0.0.1:80")
        assert "127.0.0.1:8000/healthz" in done.stdout + done.stderr


class TestScripts:
    def test_requirements_are_those_of_the_project(self):
        argv = [sys.executable, str(DEPLOY / "requirements.py"), str(REPOSITORY / "pyproject.toml")]
        printed = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
        assert printed == project["project"]["dependencies"]

    def test_requirements_of_extras_come_behind(self):
        argv = [sys.executable, str(DEPLOY / "requirements.py"), str(REPOSITORY / "pyproject.toml")]
        printed = subprocess.run([*argv, "shared", "guided"], check=True, capture_output=True, text=True).stdout
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        assert printed.splitlines() == [*project["dependencies"], *extras["shared"], *extras["guided"]]

    def test_an_extra_that_is_none_is_named(self):
        argv = [sys.executable, str(DEPLOY / "requirements.py"), str(REPOSITORY / "pyproject.toml"), "sharde"]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 1
        assert "'sharde'" in done.stderr
        assert not done.stdout

    def test_build_image_explains_itself(self):
        done = subprocess.run([DEPLOY / "build-image", "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert "--wheels DIR" in done.stdout

    def test_build_image_refuses_what_it_does_not_know(self):
        done = subprocess.run([DEPLOY / "build-image", "--wheel", "x"], capture_output=True, text=True)
        assert done.returncode == 1
        assert "--wheel: unknown option" in done.stderr

    @pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
    @pytest.mark.parametrize("name", ["build-image", "entrypoint"])
    def test_shellcheck_is_content(self, name: str):
        done = subprocess.run(["shellcheck", DEPLOY / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
