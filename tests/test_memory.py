"""The learner's memory as `sdft check` predicts it, against the peak of a real one."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from actors.process import GIB
from benchmarks.learner_step import COMPLETION, LOSS, PROMPT, samples
from benchmarks.measure import resident_kib
from learner.config import LearnerConfig, LoraConfig, TeacherConfig
from learner.group import LearnerGroup
from learner.types import LearnerSettings, StageSettings
from services.memory import learner_gib
from services.processor import native_dtype
from services.shape import ModelShape

BASE = LearnerConfig(micro_batch_tokens=8192)
NATIVE = native_dtype("cpu")  # the other one may take minutes here


@pytest.mark.parametrize(
    ("dtype", "config", "sequences"),
    [
        (NATIVE, BASE, 5),
        ("float32", BASE.model_copy(update={"zero_stage": 2}), 4),
        (NATIVE, BASE.model_copy(update={"gradient_checkpointing": True}), 8),
        (NATIVE, BASE.model_copy(update={"lora": LoraConfig()}), 5),
    ],
)
def test_the_predicted_peak_is_within_15_percent_of_the_measured_one(
    ray_cluster: None, smollm2: Path, dtype: str, config: LearnerConfig, sequences: int
) -> None:
    teacher, stage = TeacherConfig(), StageSettings(0, 10, LOSS, config.optimizer)
    settings = LearnerSettings(str(smollm2), dtype, "cpu", 0, config, (stage,), teacher)

    async def peak() -> float:
        group = await LearnerGroup.start(settings, np.arange(100, 148, dtype=np.int32), [{"num_cpus": 1}])
        for step in range(2):
            await group.train_step(samples(sequences))
            for role in ("student", "teacher"):
                await group.publish(role, step)
                await group.release(role)
        reached = resident_kib("VmHWM", group.pids[0]) * 1024 / GIB
        group.workers[0].__ray_terminate__.remote()
        return reached

    shape = ModelShape.of(smollm2, config.lora)
    predicted = learner_gib(config, teacher, dtype, shape, sequences * (PROMPT + COMPLETION), sequences * COMPLETION)
    assert predicted == pytest.approx(asyncio.run(peak()), rel=0.15)


def test_a_lora_teacher_that_becomes_the_student_at_each_stage_keeps_its_change_in_float32() -> None:
    shape = ModelShape(parameters=0, layers=1, hidden=8, intermediate=8, vocabulary=8, adapted=2**30)
    lora = BASE.model_copy(update={"lora": LoraConfig()})

    def gib(weights: str, stages: int) -> float:
        return learner_gib(lora, TeacherConfig(weights=weights), NATIVE, shape, 1, 1, stages)

    assert gib("frozen", 2) - gib("frozen", 1) == pytest.approx(4)
    assert gib("base", 2) == gib("base", 1)
    assert gib("ema", 2) == gib("ema", 1)
