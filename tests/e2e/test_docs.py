"""Every block of code in the documentation is run, and answers what the documentation says, or a table says why not."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from service.settings import load_settings
from tests.documented import differences
from tests.documented_blocks import READ, RUN, Block, blocks_of, elsewhere, pages
from tests.documented_elsewhere import ELSEWHERE, PRELUDES
from tests.documented_pages import DOCUMENTED_URL, opened
from tests.server import ROOT

OPENAPI = json.loads((ROOT / "tests" / "api" / "openapi.json").read_text(encoding="utf-8"))
BLOCKS = [block for page in pages() for block in blocks_of(page)]
RUNNING = [page for page in pages() if any(True for block in blocks_of(page) for _ in block.runs())]


@pytest.mark.parametrize("page", RUNNING)
def test_a_page_runs_and_answers_what_it_says(page: str, tmp_path: Path) -> None:
    with opened(page, tmp_path) as run:
        for block in blocks_of(page):
            run.block(block)


# --- nothing is left out ----------------------------------------------------------------------------


def test_every_block_is_of_a_kind_that_is_run_or_read() -> None:
    assert len(BLOCKS) > 80
    for block in BLOCKS:
        assert block.language in {*RUN, *READ, ""}, f"{block.page}: {block.language}\n{block.text}"
        assert block.language not in RUN or block.commands, f"{block.page}: nothing to run in\n{block.text}"
        assert block.language or not re.search(r"^\$ |^(curl|python|pip|vblora-serve) ", block.text, re.MULTILINE)


def test_every_fence_is_seen() -> None:
    for page in pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert "~~~" not in text
        assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks_of(page)), page


def test_the_table_has_no_entry_for_nothing() -> None:
    for page, entries in ELSEWHERE.items():
        used = {elsewhere(page, command) for block in blocks_of(page) for command in block.commands}
        assert set(entries) == used - {None}, page
    assert PRELUDES.keys() <= set(RUNNING)


def test_the_tests_that_the_table_names_exist() -> None:
    for page, entries in ELSEWHERE.items():
        for entry, why in entries.items():
            assert why, f"{page}: {entry}"
            for path in re.findall(r"tests/[\w/]+(?:\.py)?", why):
                assert (ROOT / path).exists(), f"{page}: {entry}: {path}"


def test_most_of_what_is_shown_is_run() -> None:
    shown = [(block.page, command) for block in BLOCKS for command in block.commands]
    left = [command for page, command in shown if elsewhere(page, command) is not None]
    assert len(shown) > 120
    assert len(shown) - len(left) > 115


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=lambda block: block.page)
def test_what_is_not_run_is_at_least_shell(block: Block) -> None:
    read = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=30)
    assert read.returncode == 0, read.stderr


# --- what is read -----------------------------------------------------------------------------------


def body_of(path: str, *, answered: bool = False) -> Callable[[Any], None]:
    """A check that something is a body of POST `path`, sent or answered, by the API's schema."""
    operation = OPENAPI["paths"][path]["post"]
    holder = operation["responses"]["200"] if answered else operation["requestBody"]
    schema = holder["content"]["application/json"]["schema"]
    validator = jsonschema_rs.validator_for({**schema, "components": OPENAPI["components"]})
    return lambda body: validator.validate(body)


def access_line(line: Any) -> None:
    assert {
        "request_id",
        "method",
        "path",
        "status",
    } <= line.keys()  # the rest: tests/unit/service/test_operations_doc.py


JSON: dict[str, list[Callable[[Any], None]]] = {
    "docs/api.md": [body_of("/v1/classify"), body_of("/v1/classify", answered=True)],
    "docs/operations.md": [access_line],
}


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "json"}))
def test_json_is_what_it_is_shown_as(page: str) -> None:
    blocks = [block for block in blocks_of(page) if block.language == "json"]
    for block, check in zip(blocks, JSON[page], strict=True):
        check(json.loads(block.text))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml"], ids=lambda block: block.page)
def test_toml_is_settings(block: Block, tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text(block.text, encoding="utf-8")
    settings = load_settings({}, config=config, environ={})
    assert tomllib.loads(block.text).keys()
    assert settings != load_settings({}, environ={})


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda block: block.page)
def test_yaml_is_yaml(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)


# --- answers and routes -----------------------------------------------------------------------------


def test_a_wrong_answer_is_noticed() -> None:
    assert differences('{"r": 4}', '{"r":5}')
    assert differences('{"r": 4}', '{"r":4,"topk":2}')
    assert differences("refused", "accepted")
    assert not differences('{"r": 4, "id": "a"}', '{"r":4,"id":"b"}')


def test_every_route_is_documented_with_a_command() -> None:
    routes = {(method, path) for path, methods in OPENAPI["paths"].items() for method in methods}
    commands = [command for block in blocks_of("docs/api.md") for command in block.commands]
    shown = {call for command in commands for call in _calls(command)}
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
