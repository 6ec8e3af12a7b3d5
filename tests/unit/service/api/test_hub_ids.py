"""How repositories, patterns of them and templates for them are written."""

from __future__ import annotations

import pytest

from service.api.hub_ids import HubPattern, HubRepo, HubTemplate


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        ("hf://org/repo", HubRepo("org", "repo")),
        ("org/repo.v1_x-y", HubRepo("org", "repo.v1_x-y")),
        ("hf://Org/repo@main", HubRepo("Org", "repo", "main")),
        ("hf://org/repo@refs/pr/1", HubRepo("org", "repo", "refs/pr/1")),
    ],
)
def test_repositories(text: str, repo: HubRepo) -> None:
    assert HubRepo.parse(text) == repo
    assert HubRepo.parse(str(repo)) == repo


@pytest.mark.parametrize(
    "text",
    ["hf://repo", "hf://org/", "hf://org/a/b", "hf://org/..", "hf://org/a..b", "hf://org/a--b", "hf://org/a.git",
     "hf://org/a@", "hf://org/a@-x", "hf://org/a b", "hf://org/é", "hf://-org/a", "hf://org/" + "x" * 96, "org/a\n",
     "hf://org/a@v/../../x"],
)  # fmt: skip
def test_no_repositories(text: str) -> None:
    with pytest.raises(ValueError, match="is no repository"):
        HubRepo.parse(text)


@pytest.mark.parametrize(
    ("pattern", "covered", "others"),
    [
        ("hf://*", ["a/b", "c/d"], []),
        ("hf://a/*", ["a/b", "a/c"], ["b/a", "A/b", "aa/b"]),
        ("hf://a/b", ["a/b", "a/b@v1"], ["a/c", "a/bb"]),
    ],
)
def test_patterns(pattern: str, covered: list[str], others: list[str]) -> None:
    parsed = HubPattern.parse(pattern)
    assert all(parsed.covers(HubRepo.parse(text)) for text in covered)
    assert not any(parsed.covers(HubRepo.parse(text)) for text in others)


@pytest.mark.parametrize("text", ["hf://a/b*", "hf://a*/b", "hf://a", "a/*", "hf://*/b"])
def test_no_patterns(text: str) -> None:
    with pytest.raises(ValueError, match="is no pattern"):
        HubPattern.parse(text)


def test_templates() -> None:
    assert HubTemplate.parse("hf://org/*").repo_of("sql") == HubRepo("org", "sql")
    assert HubTemplate.parse("hf://org/vb-*-v1").repo_of("sql") == HubRepo("org", "vb-sql-v1")
    assert HubTemplate.parse("hf://org/*").repo_of("a--b") is None
    for text in ("hf://org/sql", "hf://*/sql", "hf://org/*/*", "org/*"):
        with pytest.raises(ValueError, match="is no template"):
            HubTemplate.parse(text)
