"""How places in buckets that speak S3 are written: one, and those that a server may read.

s3://bucket/prefix                                        BucketSource
s3://bucket/prefix, s3://bucket/prefix*, s3://bucket/*    BucketPattern
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from adapters.store.shared.s3 import SCHEME

_BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_SEGMENT = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._=+@-]+"
_SOURCE = re.compile(rf"s3://({_BUCKET})/({_SEGMENT}(?:/{_SEGMENT})*)/?")
_PATTERN = re.compile(rf"s3://{_BUCKET}/[A-Za-z0-9._=+@/-]*\*?")
_LONGEST = 900


@dataclass(frozen=True, slots=True)
class BucketSource:
    """The adapter whose files' keys are the prefix, a slash, and their names."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError."""
        match = _SOURCE.fullmatch(text)
        if match is None or len(text) > _LONGEST:
            raise ValueError(f"{text[:200]!r} is no place in a bucket: write s3://bucket/prefix")
        return cls(match[1], match[2])

    def is_within(self, url: str) -> bool:
        """Whether it is at that place, or under it."""
        return f"{self}/".startswith(f"{url.rstrip('/')}/")

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}"


@dataclass(frozen=True, slots=True)
class BucketPattern:
    """One place, or with a `*` at the end all whose text begins so."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        if not _PATTERN.fullmatch(text):
            raise ValueError(f"{text!r} is no pattern of places: write s3://bucket/prefix, s3://bucket/prefix* or …/*")
        return cls(text)

    def covers(self, source: BucketSource) -> bool:
        if self.text.endswith("*"):
            return str(source).startswith(self.text[:-1])
        return str(source) == self.text.rstrip("/")
