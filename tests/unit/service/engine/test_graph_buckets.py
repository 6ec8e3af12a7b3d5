"""Which shapes are captured, and which one a step takes."""

from __future__ import annotations

import pytest

from service.engine.graphs.buckets import Bucket, Buckets


def test_powers_of_two_up_to_what_there_is_and_that_itself() -> None:
    buckets = Buckets.of(18, 200, most=64)
    assert buckets.rows == (1, 2, 4, 8, 16, 18)
    assert buckets.columns == (64, 128, 200)
    assert len(buckets.all()) == 18
    assert buckets.all()[0] == Bucket(18, 200), "the largest first"


@pytest.mark.parametrize(
    ("rows", "columns", "bucket"),
    [
        (1, 1, Bucket(1, 64)),
        (1, 64, Bucket(1, 64)),
        (3, 65, Bucket(4, 128)),
        (17, 129, Bucket(18, 200)),
        (18, 200, Bucket(18, 200)),
        (19, 1, None),
        (1, 201, None),
    ],
)
def test_the_smallest_that_fits(rows: int, columns: int, bucket: Bucket | None) -> None:
    assert Buckets.of(18, 200, most=64).fitting(rows, columns) == bucket


@pytest.mark.parametrize("most", [1, 2, 5, 6, 12, 17, 18, 64])
def test_no_more_than_are_allowed_and_always_the_largest(most: int) -> None:
    buckets = Buckets.of(18, 200, most=most)
    assert 1 <= len(buckets.all()) <= most
    assert buckets.fitting(18, 200) == Bucket(18, 200)
    assert buckets.fitting(1, 1) is not None


def test_one_row_of_few_columns() -> None:
    assert Buckets.of(1, 64, most=64).all() == [Bucket(1, 64)]
