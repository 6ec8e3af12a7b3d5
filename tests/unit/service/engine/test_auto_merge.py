"""The policy against a clock that the test sets: every step takes what it is told to take."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from service.engine.auto_merge import AutoMerge

FOLD_S = 0.050


@dataclass
class Machine:
    """Runs steps as the worker does: asks the policy, folds or restores, and reports what it took."""

    plain_s: float = 0.010
    folded_s: float = 0.008

    def __post_init__(self) -> None:
        self.policy = AutoMerge()
        self.folded: str | None = None
        self.folds = 0
        self.spent_s = 0.0

    def step(self, selection: str | None, jitter: float = 0.0) -> None:
        wanted = selection if selection is not None and self.policy.wants(selection) else None
        if self.folded is not None and wanted != self.folded:
            self.folded = None
            self.spent_s += FOLD_S
        if wanted is not None and self.folded is None:
            self.folded = wanted
            self.folds += 1
            self.spent_s += FOLD_S
            self.policy.folded_in(FOLD_S)
        seconds = (self.folded_s if self.folded else self.plain_s) + jitter
        self.spent_s += seconds
        self.policy.observe(selection, seconds, folded=self.folded is not None)

    def run(self, selection: str | None, steps: int) -> list[bool]:
        """Whether each step ran folded."""
        folded = []
        for _ in range(steps):
            self.step(selection)
            folded.append(self.folded is not None)
        return folded


def test_folds_what_has_been_alone_for_a_while_and_stays_so() -> None:
    machine = Machine()
    folded = machine.run("sql", 1000)
    assert not any(folded[:32])
    assert all(folded[40:])
    assert machine.folds == 1


def test_a_fold_pays() -> None:
    machine = Machine()
    machine.run("sql", 2000)
    assert machine.spent_s < 2000 * machine.plain_s * 0.85


def test_mixed_batches_and_the_base_never_fold() -> None:
    machine = Machine()
    assert not any(machine.run(None, 500))
    for i in range(500):
        machine.step(["sql", None][i % 2])
    assert machine.folds == 0
    assert not machine.policy.wants("sql")


def test_unfolds_when_another_joins() -> None:
    machine = Machine()
    machine.run("sql", 100)
    assert machine.folded == "sql"
    assert not machine.policy.wants("style"), "what joins must not run on the fold either"
    assert machine.run(None, 1) == [False]
    assert not any(machine.run("sql", 20)), "and waits again"


def test_a_dearer_fold_waits_until_it_would_pay() -> None:
    machine = Machine(folded_s=0.0099)  # saves 0.1 ms a step: two times 50 ms pay after 1,000 steps
    machine.run("sql", 200)
    machine.run(None, 1)
    folded = machine.run("sql", 3000)
    assert 1000 <= folded.index(True) <= 2500


@pytest.mark.parametrize("folded_s", [0.010, 0.012])
def test_gives_up_where_folding_does_not_help(folded_s: float) -> None:
    machine = Machine(folded_s=folded_s)
    folded = machine.run("sql", 4000)
    assert machine.folds == 1
    assert sum(folded) <= 20
    machine.run("style", 2000)
    assert machine.folds == 1, "not with another selection either"


def test_noise_does_not_make_it_swing() -> None:
    machine = Machine()
    for i in range(3000):
        machine.step("sql", jitter=0.006 * ((i * 7919) % 11 - 5) / 5)
    assert machine.folds <= 2


def test_selections_that_take_turns_are_not_folded_over_and_over() -> None:
    """Each is alone just long enough to be folded, and gone before that has paid."""
    machine = Machine()
    for i in range(400):
        machine.run(f"adapter-{i % 2}", 40)
    assert machine.folds <= 20
    assert machine.spent_s < 400 * 40 * machine.plain_s * 1.02


def test_after_turns_that_did_not_pay_a_long_run_still_does() -> None:
    machine = Machine()
    for i in range(40):
        machine.run(f"adapter-{i % 2}", 40)
    folded = machine.run("adapter-0", 6000)
    assert folded[-1]
    assert sum(folded) > 1500
