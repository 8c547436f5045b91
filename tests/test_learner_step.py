"""The DeepSpeed learner against one process of plain transformers and torch, on the same rollouts."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.config import LearnerConfig, LossConfig, OptimizerConfig, TeacherConfig
from learner.group import LearnerGroup
from learner.optimizer import learning_rate
from learner.types import LearnerSettings
from tests.reference import Reference
from tests.rollouts import make_rollouts

STEPS, K, ALPHA = 3, 16, 0.1
OPTIMIZER = OptimizerConfig(lr=1e-4, warmup_steps=1, schedule="constant", grad_clip=0.5)
PROBE = np.arange(20, 36, dtype=np.int32)


def settings(model: Path, stage: int, ranks: int, dtype: str = "float32", **changes: Any) -> LearnerSettings:
    """`changes`: of the learner's configuration."""
    usual = {"micro_batch_tokens": 100, "optimizer": OPTIMIZER}
    config = LearnerConfig(ranks=ranks, zero_stage=stage, threads=1, **usual | changes)
    return LearnerSettings(
        model=str(model),
        dtype=dtype,
        device="cpu",
        seed=0,
        total_steps=STEPS,
        config=config,
        loss=LossConfig(top_k=K),
        teacher=TeacherConfig(alpha=ALPHA),
    )


def apart(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Euclidean distance over all parameters."""
    return float(np.sqrt(sum(np.square(ours[n].astype(np.float64) - theirs[n]).sum() for n in ours)))


def worst(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def assert_equal(
    student: dict[str, np.ndarray], teacher: dict[str, np.ndarray], plain: Reference, before: dict[str, np.ndarray]
) -> None:
    """Student and teacher are the reference's; what differs is tiny beside what moved since `before`."""
    for ours, theirs in (
        (student, {n: p.numpy() for n, p in plain.weights().items()}),
        (teacher, {n: p.numpy() for n, p in plain.teacher.items()}),
    ):
        assert worst(ours, theirs) < 1e-5
        assert apart(ours, theirs) < 1e-3 * apart(ours, before)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> tuple[Reference, list[float]]:
    plain = Reference(tiny_model, ALPHA, skip=3, cap=2.0, clip=0.5)
    losses = [
        plain.step(make_rollouts(tiny_model, 7, K, seed), learning_rate(seed + 1, STEPS, OPTIMIZER))
        for seed in range(STEPS)
    ]
    return plain, losses


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 1), (3, 1), (1, 2)])
def test_three_steps_equal_plain_torch(
    ray_cluster: None, tiny_model: Path, reference: tuple[Reference, list[float]], stage: int, ranks: int
) -> None:
    """Losses, parameters and EMA teacher, over several micro-batches; one sequence is shorter than the skipped part.

    The other stages and ranks are compared with the same reference by test_learner_state.
    """
    plain, losses = reference

    async def run() -> None:
        group = await LearnerGroup.start(settings(tiny_model, stage, ranks), PROBE, [{"num_cpus": 0.5}] * ranks)
        before = await group.parameters("student")
        for seed, expected in enumerate(losses):
            result = await group.train_step(make_rollouts(tiny_model, 7, K, seed))
            assert result.loss == pytest.approx(expected, rel=1e-5)
            assert result.lr == learning_rate(seed + 1, STEPS, OPTIMIZER)
        student, teacher = await group.parameters("student"), await group.parameters("teacher")
        assert_equal(student, teacher, plain, before)
        assert apart(student, teacher) > 0.5 * apart(student, before)
        for worker in group.workers:
            worker.__ray_terminate__.remote()

    asyncio.run(run())
