"""Every command in the documentation is run, and answers what the documentation says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documented import commands_of, demo_server, differences, workplace
from tests.server import ROOT

DOCUMENTS = ["README.md", "docs/api.md", "docs/operations.md"]


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
