"""Every command in the documentation is run, and answers what the documentation says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documented import DOCUMENTED_URL, commands_of, demo_server, differences, workplace
from tests.server import ROOT

OPENAPI = ROOT / "tests" / "api" / "openapi.json"
DOCUMENTS = ["README.md", "docs/api.md", "docs/operations.md", "docs/export.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_commands_answer_what_is_documented(document: str, tmp_path: Path) -> None:
    commands = commands_of(ROOT / document)
    assert len(commands) >= 5, "the document shows commands"
    (tmp_path / "work").mkdir()
    folder = workplace(tmp_path / "work")
    with demo_server(tmp_path / "data") as server:
        for command in commands:
            assert not differences(command.answer, command.run(server, folder)), command.text


def test_a_wrong_answer_is_noticed() -> None:
    assert differences('{"r": 4}', '{"r":5}')
    assert differences('{"r": 4}', '{"r":4,"topk":2}')
    assert differences("refused", "accepted")
    assert not differences('{"r": 4, "id": "a"}', '{"r":4,"id":"b"}')


def test_every_route_is_documented_with_a_command() -> None:
    routes = {
        (method, path) for path, methods in json.loads(OPENAPI.read_text())["paths"].items() for method in methods
    }
    shown = {call for command in commands_of(ROOT / "docs/api.md") for call in _calls(command.text)}
    missing = {
        (method, path)
        for method, path in routes
        if not any(method == how and re.fullmatch(re.sub(r"{[^}]+}", "[^/]+", path), where) for how, where in shown)
    }
    assert len(routes) > 20
    assert not missing


def _calls(command: str) -> Iterator[tuple[str, str]]:
    """The (method, path) of each request that a command makes with curl."""
    sends = re.search(r"\s(-d|-F|-X POST)\s", command)
    method = "delete" if "-X DELETE" in command else "post" if sends else "get"
    for url in re.findall(rf"{DOCUMENTED_URL}(/[^\s'\"?]*)", command):
        yield method, url
