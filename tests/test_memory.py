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
from services.shape import ModelShape

BASE = LearnerConfig(micro_batch_tokens=8192)


@pytest.mark.parametrize(
    ("dtype", "config", "sequences"),
    [
        ("bfloat16", BASE, 6),
        ("float32", BASE.model_copy(update={"zero_stage": 2}), 4),
        ("bfloat16", BASE.model_copy(update={"gradient_checkpointing": True}), 12),
        ("bfloat16", BASE.model_copy(update={"lora": LoraConfig()}), 6),
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
            await group.train_step(samples()[:sequences])
            for role in ("student", "teacher"):
                await group.publish(role, step)
                await group.release(role)
        reached = resident_kib("VmHWM", group.pids[0]) * 1024 / GIB
        group.workers[0].__ray_terminate__.remote()
        return reached

    shape = ModelShape.of(smollm2, config.lora)
    predicted = learner_gib(config, teacher, dtype, shape, sequences * (PROMPT + COMPLETION), sequences * COMPLETION)
    assert predicted == pytest.approx(asyncio.run(peak()), rel=0.15)
