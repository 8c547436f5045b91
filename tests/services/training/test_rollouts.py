"""Batches made ahead of the learner, with simulated engines and in simulated time."""

import asyncio
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdft.actors.shared.drafts import CompletionLost, Draft
from sdft.actors.shared.types import SampleId, Sampling, Support, TeacherScores
from sdft.learner.config import TeacherConfig
from sdft.learner.group import SequencesLost
from sdft.learner.types import StepResult
from sdft.services.algorithms.base import Algorithm
from sdft.services.algorithms.off_policy import OffPolicy
from sdft.services.algorithms.sdft import Sdft
from sdft.services.data.schedule import sample_seed
from sdft.services.planning.prepared import Prepared
from sdft.services.records.ledger import Ledger
from sdft.services.records.rows import read_jsonl
from sdft.services.training.rollouts import Batch, Rollouts
from simulation import virtual_time
from simulation.cluster import Case, Learner, Student, Teacher, drive, pool, prepared, scores

CASE = Case("rollouts", engines=2, staleness=1, steps=3)
SDFT = Sdft()


async def ready() -> None: ...


class Stuck(Student):
    """Answers health checks, and finishes no rollout."""

    def generate(self, items: Any, argument: Any) -> tuple[float, Any]:
        return 1e9, super().generate(items, argument)[1]


def made(student: Any, tmp_path: Path, *, first: int = 1, **sampling: Any) -> Batch:
    """Return the batch of a step. sampling: changes to its stage's configuration."""

    async def run() -> Batch:
        students = pool(CASE, "student", 2, lambda number: student(number, CASE))
        teachers = pool(CASE, "teacher", 1, Teacher)
        await asyncio.gather(students.start(), teachers.start())
        one = prepared(CASE, 6)
        (stage,) = one.stages
        config = stage.config.model_copy(update={"sampling": stage.config.sampling.model_copy(update=sampling)})
        one = replace(one, stages=(replace(stage, config=config),))
        rollouts = Rollouts(one, students, {"": teachers}, Ledger(tmp_path / "ledger.sqlite"), ready, 0)
        rollouts.open(one.schedule.stages[0])
        rollouts.begin(0)
        assert rollouts.begun == 2
        try:
            return await rollouts.take(first)
        finally:
            await rollouts.stop()

    batch: Batch = virtual_time.run(run())
    return batch


def live(case: Case, batch: int, method: Algorithm = SDFT) -> Prepared:
    """Return a run whose teacher has the student's weights, so that the student engines score."""
    one = prepared(case, batch)
    config = one.config.model_copy(update={"method": method, "teacher": TeacherConfig(weights="live")})
    (task,) = config.tasks
    return replace(one, config=config, stages=(replace(one.stages[0], config=task),))


def test_a_batch_that_is_cancelled_as_it_begins_leaves_no_coroutine(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """A signal may come when a batch has a task that has not run. Its groups have no coroutines by then."""

    async def run() -> None:
        students, teachers = (pool(CASE, name, 1, lambda i: Student(i, CASE)) for name in ("student", "teacher"))
        await asyncio.gather(students.start(), teachers.start())
        ready_made = prepared(replace(CASE, staleness=0), 6)
        rollouts = Rollouts(ready_made, students, {"": teachers}, Ledger(tmp_path / "ledger.sqlite"), ready, 0)
        rollouts.open(ready_made.schedule.stages[0])
        rollouts.begin(0)
        await asyncio.sleep(0)
        await rollouts.stop()

    virtual_time.run(run())
    gc.collect()
    assert [str(w.message) for w in recwarn if "never awaited" in str(w.message)] == []


def test_a_sample_is_scored_while_others_of_its_batch_are_still_sampled(tmp_path: Path) -> None:
    times = made(Student, tmp_path).times.seconds
    assert times["rollout"] > 0
    assert times["score"] < 0.28 * 6  # the one teacher's time for all six, if it began after the last rollout


def test_rollouts_are_sampled_as_the_stage_says_and_each_by_its_own_seed(tmp_path: Path) -> None:
    class Told(Student):
        def generate(self, items: Any, argument: Any) -> tuple[float, Any]:
            asked.update((item.seed, argument) for item in items)
            return super().generate(items, argument)

    asked: set[tuple[int, Sampling]] = set()
    samples = made(Told, tmp_path, max_new_tokens=9, temperature=0.7, top_p=0.9).samples
    assert {sampling for _, sampling in asked} == {Sampling(9, 0.7, 0.9)}
    assert {seed for seed, _ in asked} >= {sample_seed(0, one) for one in samples}


@pytest.mark.parametrize("method", [SDFT, OffPolicy()], ids=lambda method: method.type)
def test_a_live_teacher_has_the_students_weights_of_the_step_before(tmp_path: Path, method: Algorithm) -> None:
    class Both(Student):
        """Scores too, and returns its weight version with the scores."""

        def score(self, pairs: list[Any], k: int) -> tuple[float, list[TeacherScores]]:
            return 0.1, [scores(len(completion), self.version) for _, completion in pairs]

    case = Case("live", engines=1, staleness=0, steps=4)
    with Path("/dev/null").open("w") as nowhere:
        drive(
            live(case, 8, method), tmp_path, case, lambda number: Both(number, case), Learner(0.1), nowhere, teachers=0
        )
    assert [row["teacher_version"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_timeout_names_the_engines_that_hold_the_missing_samples(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError) as error:
        made(Stuck, tmp_path)
    assert str(error.value) == (
        "waited 72000 s for the rollouts and scores of step 1: student engine 0 has 6 in flight, student engine 1 has "
        "6 in flight, 0 wait for a student engine; 0 wait for a teacher engine"
    )


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_batch_that_loses_completions_is_made_again_and_counted_once(tmp_path: Path, staleness: int) -> None:
    """They are lost before they are scored, and once more before the learner has fetched them."""

    class Forgetful(Student):
        def score(self, pairs: list[Any], k: int) -> tuple[float, list[TeacherScores]]:
            return 0.1, [scores(len(completion), self.version) for _, completion in pairs]

        def score_completions(self, items: list[Any], support: Support) -> Any:
            asked.append(len(items))
            if len(asked) == 1:
                raise CompletionLost("the engine that made it has died")
            return super().score_completions(items, support)

    class Fetching(Learner):
        async def train_step(self, drafts: list[Draft]) -> StepResult:
            batches.append([draft.sample for draft in drafts])
            if len(batches) == 2:
                raise SequencesLost(batches[-1][:1])
            return await super().train_step(drafts)

    asked: list[int] = []
    batches: list[list[SampleId]] = []
    case = Case("lost", engines=1, staleness=staleness, steps=2)
    with (tmp_path / "log").open("w") as said:
        drive(live(case, 4), tmp_path, case, lambda number: Forgetful(number, case), Fetching(0.1), said, teachers=0)
    assert batches[1] == batches[2] != batches[0]
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["trained"], row["dropped"]) for row in rows] == [(4, 0), (8, 0)]
    assert "step 2: the completions or scores of 1 samples were lost" in " ".join(
        (tmp_path / "log").read_text().split()
    )
