"""The whole survey of architectures: about two minutes on one core. docs/architectures.md is what it makes."""

from __future__ import annotations

import pytest

from tests.survey.__main__ import PAGE, render, versions
from tests.survey.configs import SURVEYED
from tests.survey.survey import Finding, survey

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return [survey(architecture) for architecture in SURVEYED]


def test_none_is_answered_wrongly(findings: list[Finding]) -> None:
    assert [finding for finding in findings if finding.outcome not in ("works", "refused")] == []
    assert sum(finding.outcome == "works" for finding in findings) >= 100


def test_the_page_is_what_the_survey_makes(findings: list[Finding]) -> None:
    """But for the versions."""

    def lines(text: str) -> list[str]:
        return ["Versions: …" if line.startswith("Versions: ") else line for line in text.splitlines()]

    assert versions() in render(findings)
    assert lines(PAGE.read_text(encoding="utf-8")) == lines(render(findings))
