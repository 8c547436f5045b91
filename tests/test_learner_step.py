"""The DeepSpeed learner against one process of plain transformers and torch, on the same rollouts."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.types import ScoredRollout
from learner.config import LearnerConfig, LossConfig, OptimizerConfig, TeacherConfig
from learner.group import LearnerGroup
from learner.types import LearnerSettings, StageSettings
from tests.reference import Reference
from tests.rollouts import make_rollouts

STEPS, K, ALPHA = 3, 16, 0.1
BOUNDARY = 2  # steps of the first of two stages
BETAS = (0.8, 0.99)  # of the second
OPTIMIZER = OptimizerConfig(lr=1e-4, warmup_steps=1, schedule="constant", grad_clip=0.5)
PROBE = np.arange(20, 36, dtype=np.int32)


def second(optimizer: OptimizerConfig) -> OptimizerConfig:
    """What the second stage has in its place."""
    return optimizer.model_copy(update={"lr": optimizer.lr / 2, "betas": BETAS})


def rate(step: int, optimizer: OptimizerConfig = OPTIMIZER) -> float:
    """Learning rate of a step, counted from 1."""
    return optimizer.lr if step <= BOUNDARY else second(optimizer).lr


def settings(model: Path, stage: int, ranks: int, dtype: str = "float32", **changes: Any) -> LearnerSettings:
    """`changes`: of the learner's configuration."""
    usual = {"micro_batch_tokens": 100, "optimizer": OPTIMIZER}
    config = LearnerConfig(ranks=ranks, zero_stage=stage, threads=1, **usual | changes)
    return LearnerSettings(
        model=str(model),
        dtype=dtype,
        device="cpu",
        seed=0,
        config=config,
        stages=(
            StageSettings(0, BOUNDARY, LossConfig(top_k=K), config.optimizer),
            StageSettings(BOUNDARY, STEPS - BOUNDARY, LossConfig(top_k=K), second(config.optimizer)),
        ),
        teacher=TeacherConfig(alpha=ALPHA),
    )


def spoiled(samples: list[ScoredRollout]) -> list[ScoredRollout]:
    """With a log-prob of the teacher's that is no number."""
    samples[2].scores.logprobs[-1, 0] = np.nan
    return samples


def apart(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Euclidean distance over all parameters."""
    return float(np.sqrt(sum(np.square(ours[n].astype(np.float64) - theirs[n]).sum() for n in ours)))


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> np.ndarray:
    """All parameters' changes, end to end."""
    return np.concatenate([(after[name] - before[name]).astype(np.float64).ravel() for name in sorted(before)])


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
def reference(tiny_model: Path) -> tuple[Reference, list[tuple[float, float]]]:
    """And the loss and the gradient's norm of each step."""
    plain = Reference(tiny_model, ALPHA, skip=3, cap=2.0, clip=0.5)
    losses = []
    for seed in range(STEPS):
        if seed == BOUNDARY:
            plain.begin_stage(BETAS)
        losses.append((plain.step(make_rollouts(tiny_model, 7, K, seed), rate(seed + 1)), plain.norm))
    return plain, losses


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 1), (3, 1), (1, 2)])
def test_three_steps_equal_plain_torch(
    ray_cluster: None, tiny_model: Path, reference: tuple[Reference, list[tuple[float, float]]], stage: int, ranks: int
) -> None:
    """Losses, parameters and EMA teacher, over several micro-batches; one sequence is shorter than the skipped part.

    A batch whose gradient is not finite changes nothing.

    The last step is a second stage's first: the teacher is the student again, and AdamW begins anew, otherwise set.
    The other stages and ranks are compared with the same reference by test_learner_state.
    """
    plain, losses = reference

    async def run() -> None:
        group = await LearnerGroup.start(settings(tiny_model, stage, ranks), PROBE, [{"num_cpus": 0.5}] * ranks)
        before = await group.parameters("student")
        for seed, (expected, norm) in enumerate(losses):
            if seed == BOUNDARY:
                for _ in range(2):  # as after a restart in between: the same as once
                    await group.begin_stage()
            result = await group.train_step(make_rollouts(tiny_model, 7, K, seed))
            assert result.loss == pytest.approx(expected, rel=1e-5)
            assert result.lr == rate(seed + 1)
            assert result.applied
            assert result.grad_norm == pytest.approx(norm, rel=1e-4)
        student, teacher = await group.parameters("student"), await group.parameters("teacher")
        assert_equal(student, teacher, plain, before)
        assert apart(student, teacher) > 0.2 * apart(student, before)
        result = await group.train_step(spoiled(make_rollouts(tiny_model, 7, K, STEPS)))
        assert not result.applied
        assert not np.isfinite(result.grad_norm)
        assert worst(await group.parameters("student"), student) == 0
        assert worst(await group.parameters("teacher"), teacher) == 0
        for worker in group.workers:
            worker.__ray_terminate__.remote()

    asyncio.run(run())


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16")])
def test_a_first_step_that_is_not_taken_leaves_a_teacher_and_a_state(
    ray_cluster: None, tiny_model: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    """The optimizer's state was made by the first step that was: sending the teacher and saving ended the run."""

    async def run() -> None:
        group = await LearnerGroup.start(settings(tiny_model, stage, 1, dtype), PROBE, [{"num_cpus": 0.5}])
        before = await group.parameters("student")
        assert not (await group.train_step(spoiled(make_rollouts(tiny_model, 7, K, 0)))).applied
        assert worst(await group.parameters("teacher"), before) == 0
        await group.save(tmp_path)
        await group.written()
        assert (await group.train_step(make_rollouts(tiny_model, 7, K, 1))).applied
        assert await group.load(tmp_path) == 1
        assert worst(await group.parameters("student"), before) == 0
        for worker in group.workers:
            worker.__ray_terminate__.remote()

    asyncio.run(run())


@pytest.mark.parametrize("ranks", [1, 2])
def test_bfloat16_takes_the_steps_of_float32_but_for_rounding(
    ray_cluster: None, tiny_model: Path, reference: tuple[Reference, list[tuple[float, float]]], ranks: int
) -> None:
    """One rank adds gradients up with nobody, past DeepSpeed's reduction: over several micro-batches, none is lost."""
    plain, losses = reference
    begun = {name: tensor.numpy() for name, tensor in Reference(tiny_model, ALPHA, 3, 2.0, 0.5).weights().items()}

    async def run() -> None:
        group = await LearnerGroup.start(settings(tiny_model, 1, ranks, "bfloat16"), PROBE, [{"num_cpus": 0.5}] * ranks)
        before = await group.parameters("student")
        for seed, (expected, norm) in enumerate(losses):
            if seed == BOUNDARY:
                await group.begin_stage()
            result = await group.train_step(make_rollouts(tiny_model, 7, K, seed))
            assert result.loss == pytest.approx(expected, rel=0.01)
            assert result.grad_norm == pytest.approx(norm, rel=0.02)
        for role, theirs in (("student", plain.weights()), ("teacher", plain.teacher)):
            ours = moved(before, await group.parameters(role))
            exact = moved(begun, {name: tensor.numpy() for name, tensor in theirs.items()})
            assert float(ours @ exact) > 0.98 * np.linalg.norm(ours) * np.linalg.norm(exact)
            assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(exact), rel=0.01)
        for worker in group.workers:
            worker.__ray_terminate__.remote()

    asyncio.run(run())
