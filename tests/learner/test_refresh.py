"""A teacher that is refreshed: it stays as it is, becomes the student, and is restored."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from sdft.learner.config import LoraConfig, TeacherConfig
from sdft.learner.group import LearnerGroup
from tests.fakes.rollouts import make_rollouts
from tests.learner.test_learner_step import PROBE, K, settings, worst

LORA = LoraConfig(rank=4, targets=("q_proj", "down_proj"))


async def started(model: Path, stage: int, ranks: int, lora: LoraConfig | None) -> LearnerGroup:
    given = settings(model, stage, ranks, lora=lora)
    given = replace(given, stages=given.stages[:1], teacher=TeacherConfig(weights="gated", refresh_every=1))
    return await LearnerGroup.start(given, PROBE, [{"num_cpus": 0.5}] * ranks)


@pytest.mark.parametrize(("stage", "ranks", "lora"), [(0, 1, None), (3, 2, None), (1, 1, LORA)])
def test_a_teacher_is_refreshed_between_steps_and_kept_in_a_checkpoint(
    ray_cluster: None, tiny_model: Path, tmp_path: Path, stage: int, ranks: int, lora: LoraConfig | None
) -> None:
    """A refresh changes nothing of the student's next step but its teacher: the moments stay."""

    async def run() -> None:
        group = await started(tiny_model, stage, ranks, lora)
        rollouts = [make_rollouts(tiny_model, 5, K, seed) for seed in range(2)]
        base = await group.parameters("student")
        await group.train_step(rollouts[0])
        student = await group.parameters("student")
        assert worst(student, base) > 0
        assert worst(await group.parameters("teacher"), base) == 0
        before, after = tmp_path / "before", tmp_path / "after"
        for folder in (before, after):
            folder.mkdir()
        await group.save(before)
        await group.refresh_teacher()  # while the files are written
        await group.written()
        refreshed = await group.parameters("teacher")
        assert worst(refreshed, student) <= (0 if lora is None else 1e-6)
        await group.save(after)
        expected = await group.train_step(rollouts[1])
        await group.written()
        following = await group.parameters("student")
        assert worst(await group.parameters("teacher"), refreshed) == 0

        for folder, teacher in ((before, base), (after, refreshed)):
            assert await group.load(folder) == 1
            assert worst(await group.parameters("teacher"), teacher) == 0
            assert (await group.train_step(rollouts[1])).loss == expected.loss
            assert worst(await group.parameters("student"), following) == 0
        for worker in group.workers:
            worker.__ray_terminate__.remote()

    asyncio.run(run())
