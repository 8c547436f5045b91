"""Several external teachers, with simulated engines and in simulated time: each has its records, on its own pool."""

import asyncio
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdft.actors.shared.types import GenerateRequest, Rollout, Sampling, Snapshot
from sdft.learner.config import TeacherConfig
from sdft.services.algorithms.base import Algorithm
from sdft.services.algorithms.off_policy import OffPolicy
from sdft.services.algorithms.sdft import Sdft
from sdft.services.data.pairs import PromptPair
from sdft.services.planning.prepared import Prepared
from sdft.services.records.ledger import Ledger
from sdft.services.records.rows import read_jsonl
from sdft.services.training.rollouts import Batch, Rollouts
from simulation import virtual_time
from simulation.cluster import Case, Learner, Student, drive, pool, prepared, scores
from tests.services.algorithms.test_own import Patient

ROUTES = ("math", "code")
BATCH = 8
SDFT, OFF_POLICY = Sdft(), OffPolicy()
Calls = list[tuple[str, str, list[int]]]  # what was called, on which pool, and the records


def route_of(record: int) -> str:
    return ROUTES[record % 3 % 2]


def routed(case: Case, method: Algorithm = SDFT) -> Prepared:
    """Return a run with two teachers. The prompts of a record begin with its number."""
    one = prepared(case, BATCH)
    teacher = TeacherConfig(weights="external", models={route: f"/models/{route}" for route in ROUTES})
    config = one.config.model_copy(update={"method": method, "teacher": teacher})
    (task,), (stage,) = config.tasks, one.stages
    pairs = [PromptPair.of([i, 1], [i, 2, 2], route=route_of(i)) for i in range(len(stage.prompts))]
    stage.source.prompts = pairs
    return replace(one, config=config, stages=(replace(stage, config=task),))


def watched(case: Case, name: str, calls: Calls) -> Callable[[int], Student]:
    """Return what creates engines of a pool, which note their calls."""

    class Watched(Student):
        def generate(self, items: list[GenerateRequest], argument: Sampling) -> tuple[float, list[Rollout]]:
            calls.append(("complete", name, [int(item.prompt_ids[0]) for item in items]))
            return super().generate(items, argument)

        def score(self, pairs: list[Any], k: int) -> Any:
            calls.append(("score", name, [int(prompt[0]) for prompt, _ in pairs]))
            return 0.1 * len(pairs), [scores(len(completion)) for _, completion in pairs]

    return lambda number: Watched(number, case)


def first_batch(folder: Path, case: Case, method: Algorithm) -> tuple[Batch, Calls]:
    """Make the batch of step 1 on a pool of students and one of each teacher."""
    calls: Calls = []

    async def run() -> Batch:
        pools = {name: pool(case, name, 1, watched(case, name, calls)) for name in ("student", *ROUTES)}
        await asyncio.gather(*(engines.start() for engines in pools.values()))

        async def ready() -> None: ...

        one = routed(case, method)
        teachers = {route: pools[route] for route in ROUTES}
        rollouts = Rollouts(one, pools["student"], teachers, Ledger(folder / "ledger.sqlite"), ready, 0)
        rollouts.open(one.schedule.stages[0])
        rollouts.begin(0)
        batch = await rollouts.take(1)
        await rollouts.stop()
        await asyncio.gather(*(engines.stop() for engines in pools.values()))
        return batch

    return virtual_time.run(run()), calls


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("method", [SDFT, OFF_POLICY, Patient()], ids=["lockstep", "completed", "joined"])
def test_the_samples_of_a_record_go_to_its_teacher(tmp_path: Path, method: Algorithm, staleness: int) -> None:
    """In a strict run each teacher gets its samples in one call, as the only teacher of a run does."""
    case = Case("routes", engines=1, staleness=staleness, steps=1)
    batch, calls = first_batch(tmp_path, case, method)
    records = [draft.sample.record for draft in batch.drafts]
    assert len(set(records)) == BATCH
    for what in ("complete", "score"):
        by_teacher = what == "score" or method is OFF_POLICY
        for name in ROUTES if by_teacher else ("student",):
            own = [record for record in records if name in ("student", route_of(record))]
            asked = [given for called, pool_name, given in calls if (called, pool_name) == (what, name)]
            assert own
            if staleness == 0:
                assert asked == [own]
            else:
                assert sorted(record for given in asked for record in given) == sorted(own)
    assert {name for what, name, _ in calls if what == "score"} == set(ROUTES)


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_trains_on_what_both_teachers_score_and_sends_them_no_weights(tmp_path: Path, staleness: int) -> None:
    case = Case("routes", engines=2, staleness=staleness, steps=4)
    published: list[str] = []

    class Noting(Learner):
        async def publish(self, role: str, version: int) -> Snapshot:
            published.append(role)
            return await super().publish(role, version)

    drive(routed(case), tmp_path, case, lambda number: Student(number, case), Noting(0.1), io.StringIO())
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert set(published) == {"student"}
