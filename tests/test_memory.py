"""The learner's memory as `sdft check` predicts it, against the peak of a real one."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from actors.types import Rollout, SampleId, ScoredRollout, TeacherScores
from learner.config import LearnerConfig, LossConfig, TeacherConfig
from learner.group import LearnerGroup
from learner.types import LearnerSettings
from services.memory import GIB, ModelShape, learner_gib
from services.plan import count_parameters

PROMPT, COMPLETION, K = 96, 32, 64
BASE = LearnerConfig(micro_batch_tokens=8192)


def rollouts(count: int) -> list[ScoredRollout]:
    rng = np.random.default_rng(0)
    prompt, completion = (rng.integers(100, 40000, n).astype(np.int32) for n in (PROMPT, COMPLETION))
    logprobs = np.full((COMPLETION, K), np.log(0.9 / K), dtype=np.float32)
    ids = np.tile(np.arange(K, dtype=np.int32), (COMPLETION, 1))
    rollout = Rollout(prompt, completion, logprobs[:, 0], ((0, 0, COMPLETION),), "length")
    scores = TeacherScores(ids, logprobs, logprobs[:, 0], 0)
    return [ScoredRollout(SampleId(0, 0, i, 0), rollout, scores) for i in range(count)]


@pytest.mark.parametrize(
    ("dtype", "config", "sequences"),
    [
        ("bfloat16", BASE, 6),
        ("float32", BASE.model_copy(update={"zero_stage": 2}), 4),
        ("bfloat16", BASE.model_copy(update={"gradient_checkpointing": True}), 12),
    ],
)
def test_the_predicted_peak_is_within_15_percent_of_the_measured_one(
    ray_cluster: None, smollm2: Path, dtype: str, config: LearnerConfig, sequences: int
) -> None:
    teacher = TeacherConfig()
    settings = LearnerSettings(str(smollm2), dtype, "cpu", 0, 10, config, LossConfig(top_k=K, skip_first=0), teacher)

    async def peak() -> float:
        group = await LearnerGroup.start(settings, np.arange(100, 148, dtype=np.int32), [{"num_cpus": 1}])
        for step in range(2):
            await group.train_step(rollouts(sequences))
            for role in ("student", "teacher"):
                await group.publish(role, step)
                await group.release(role)
        status = Path(f"/proc/{group.pids[0]}/status").read_text()
        group.workers[0].__ray_terminate__.remote()
        (line,) = [x for x in status.splitlines() if x.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024 / GIB

    shape = ModelShape.of(smollm2, count_parameters(smollm2))
    predicted = learner_gib(config, teacher, dtype, shape, sequences * (PROMPT + COMPLETION), sequences * COMPLETION)
    print(f"predicted {predicted:.2f} GiB")
    assert predicted == pytest.approx(asyncio.run(peak()), rel=0.15)
