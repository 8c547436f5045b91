"""Batches made ahead of the learner, with simulated engines and in simulated time."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from benchmarks import virtual_time
from benchmarks.simulation import Case, Student, Teacher, pool, prepared
from services.ledger import Ledger
from services.rollouts import Batch, Rollouts

CASE = Case("rollouts", engines=2, staleness=1, steps=3)


async def ready() -> None: ...


class Stuck(Student):
    """Answers that it is well, and finishes nothing."""

    def generate(self, items: Any, argument: Any) -> tuple[float, Any]:
        return 1e9, super().generate(items, argument)[1]


def made(student: Any, tmp_path: Path, *, first: int = 1) -> Batch:
    async def run() -> Batch:
        students = pool(CASE, "student", 2, lambda number: student(number, CASE))
        teachers = pool(CASE, "teacher", 1, Teacher)
        await asyncio.gather(students.start(), teachers.start())
        one = prepared(CASE, 6)
        rollouts = Rollouts(one, students, teachers, Ledger(tmp_path / "ledger.sqlite"), ready, 0)
        rollouts.open(one.schedule.stages[0])
        rollouts.begin(0)
        assert rollouts.begun == 2
        try:
            return await rollouts.take(first)
        finally:
            await rollouts.stop()

    batch: Batch = virtual_time.run(run())
    return batch


def test_a_sample_is_scored_while_others_of_its_batch_are_still_sampled(tmp_path: Path) -> None:
    times = made(Student, tmp_path).times.seconds
    assert times["rollout"] > 0
    assert times["score"] < 0.28 * 6  # of all six by the one teacher, if it began after the last rollout


def test_who_has_the_samples_that_never_come_is_named(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError) as error:
        made(Stuck, tmp_path)
    assert str(error.value) == (
        "waited 72000 s for the rollouts and scores of step 1: student engine 0 has 6, student engine 1 has 6, 0 wait "
        "for a student engine; 0 wait for a teacher engine"
    )
