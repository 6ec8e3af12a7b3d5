"""How repositories of the Hugging Face Hub are written: one, those that a server may read, and those that names mean.

hf://org/repo, hf://org/repo@revision    HubRepo
hf://*, hf://org/*, hf://org/repo        HubPattern
hf://org/*, hf://org/prefix-*            HubTemplate
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

SCHEME = "hf://"

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"(?:hf://)?({_WORD})/({_WORD})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?")
_PATTERN = re.compile(rf"hf://(?:\*|({_WORD})/(?:\*|({_WORD})))")
_TEMPLATE = re.compile(rf"hf://({_WORD})/([A-Za-z0-9._-]*)\*([A-Za-z0-9._-]*)")
_LONGEST_ID = 96  # of an id, on the Hub


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A model repository, at a revision: a branch, a tag or a commit. None is its main branch."""

    org: str
    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `org/repo` or `org/repo@revision`, with or without `hf://`. Raises ValueError."""
        match = _REPO.fullmatch(text)
        if match is None or not _is_id(f"{match[1]}/{match[2]}") or ".." in (match[3] or ""):
            raise ValueError(
                f"{text[:200]!r} is no repository of the Hub: write hf://org/repo or hf://org/repo@revision"
            )
        return cls(match[1], match[2], match[3])

    @property
    def id(self) -> str:
        return f"{self.org}/{self.name}"

    def __str__(self) -> str:
        return SCHEME + self.id + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class HubPattern:
    """Repositories: all, those of one organisation, or one."""

    org: str | None
    name: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no pattern of repositories: write hf://org/*, hf://org/repo or hf://*")
        return cls(match[1], match[2])

    def covers(self, repo: HubRepo) -> bool:
        return self.org in (None, repo.org) and self.name in (None, repo.name)


@dataclass(frozen=True, slots=True)
class HubTemplate:
    """For each adapter's name the repository that would hold it."""

    org: str
    prefix: str
    suffix: str

    @classmethod
    def parse(cls, text: str) -> Self:
        match = _TEMPLATE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no template of repositories: write hf://org/* or hf://org/prefix-*")
        return cls(match[1], match[2], match[3])

    def repo_of(self, name: str) -> HubRepo | None:
        """None for a name that no repository can have."""
        try:
            return HubRepo.parse(f"{self.org}/{self.prefix}{name}{self.suffix}")
        except ValueError:
            return None


def _is_id(text: str) -> bool:
    """What the Hub asks of an id, besides its letters."""
    return len(text) <= _LONGEST_ID and ".." not in text and "--" not in text and not text.endswith(".git")
