"""A step whose gradient is not finite changes no weight; its samples are dropped with a reason. In simulated time."""

import sqlite3
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from sdft.actors.shared.drafts import Draft
from sdft.learner.types import StepResult
from sdft.services.records.rows import read_jsonl
from sdft.services.training.accounting import MOST_NOT_FINITE
from simulation.cluster import Case, Learner, Student, drive, prepared

STEPS, BATCH = 12, 8


class Unsteady(Learner):
    """A learner whose gradient is not finite at the steps `bad`."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__(0.1)
        self._bad = bad

    async def train_step(self, samples: list[Draft]) -> StepResult:
        result = await super().train_step(samples)
        if self._step not in self._bad:
            return result
        return replace(result, applied=False, loss=float("nan"), grad_norm=float("inf"))


def train(run_dir: Path, bad: set[int]) -> str:
    """Train, and return the output of the run."""
    case = Case("unsteady", engines=1, staleness=0, steps=STEPS)
    one = prepared(case, BATCH)
    said = StringIO()
    drive(one, run_dir, case, lambda number: Student(number, case), Unsteady(bad), said)
    return said.getvalue()


def test_samples_of_a_step_that_is_not_finite_are_dropped_and_accounted_for(tmp_path: Path) -> None:
    said = train(tmp_path, {2, 3, 7})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["dropped"] // BATCH for row in rows] == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert all(row["trained"] + row["dropped"] == BATCH * row["step"] for row in rows)
    assert (rows[1]["loss"], rows[1]["grad_norm"]) == (None, None)
    assert "step 7: the gradient is not finite; no weight changed, and its 8 samples are dropped" in said
    ledger = sqlite3.connect(tmp_path / "ledger.sqlite")
    found = ledger.execute("SELECT step, COUNT(*) FROM samples WHERE reason = ? GROUP BY step", (REASON,)).fetchall()
    ledger.close()
    assert found == [(2, BATCH), (3, BATCH), (7, BATCH)]


REASON = "the step's gradient was not finite"


def test_many_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="this is step 8 in a row without a finite gradient"):
        train(tmp_path, set(range(3, STEPS + 1)))
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3 + MOST_NOT_FINITE - 2
