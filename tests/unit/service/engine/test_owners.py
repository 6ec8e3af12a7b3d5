"""Whose the rows of a batch are."""

from __future__ import annotations

from service.engine.owners import shares_of
from service.engine.seam import BatchShare
from service.engine.selection import Selection
from tests.unit.service.engine.test_scheduler import selecting, sequence


def test_rows_that_run_the_same_for_the_same_tenant_are_one_share() -> None:
    sql, half = selecting("sql").selection, selecting("sql", weight=0.5).selection
    rows = [selecting("sql"), sequence("x", sql, tenant="acme"), selecting("sql", weight=0.5), sequence("y")]
    rows += [selecting("sql"), sequence("z", sql, tenant="acme")]
    assert set(shares_of(rows)) == {
        BatchShare("", sql, 2),
        BatchShare("acme", sql, 2),
        BatchShare("", half, 1),
        BatchShare("", Selection(), 1),
    }
    assert shares_of([]) == ()
