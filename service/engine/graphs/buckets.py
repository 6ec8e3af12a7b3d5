"""The shapes that decode steps come in: each is captured once, and a step takes the smallest that it fits."""

from __future__ import annotations

from dataclasses import dataclass

_LEAST_COLUMNS = 64


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A step of so many rows, which attend to so many columns of keys and values."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Buckets:
    """Numbers of rows and of columns, ascending; every pair of them is a bucket."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, rows: int, columns: int, *, most: int) -> Buckets:
        """Powers of two up to these and these themselves, no more than `most` buckets: the smallest are left out."""
        of_rows = _sizes(1, rows)[-most:]
        return cls(of_rows, _sizes(_LEAST_COLUMNS, columns)[-max(1, most // len(of_rows)) :])

    def all(self) -> list[Bucket]:
        """The largest first: what they need of a shared memory pool, the others find there."""
        return sorted((Bucket(rows, columns) for rows in self.rows for columns in self.columns), reverse=True)

    def fitting(self, rows: int, columns: int) -> Bucket | None:
        """The smallest for so many rows, the longest of which attends to so many columns; None if none is."""
        enough_rows = next((size for size in self.rows if size >= rows), None)
        enough_columns = next((size for size in self.columns if size >= columns), None)
        return Bucket(enough_rows, enough_columns) if enough_rows and enough_columns else None


def _sizes(least: int, most: int) -> tuple[int, ...]:
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return (*sizes, most)
