"""The DeepSpeed learner against plain transformers and torch in one process, on the same rollouts."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdft.actors.shared.sequences import TrainingSequence
from sdft.learner.config import Forward, LearnerConfig, LossConfig, OptimizerConfig, TeacherConfig
from sdft.learner.group import LearnerGroup
from sdft.learner.optimizer import learning_rate
from sdft.learner.types import LearnerSettings, StageSettings
from tests.fakes.reference import Reference
from tests.fakes.rollouts import make_rollouts

STEPS, K, ALPHA = 3, 16, 0.1
LOSS, SKIP = LossConfig(divergence=Forward(top_k=K)), 3
BOUNDARY = 2  # steps of the first of two stages
BETAS = (0.8, 0.99)  # of the second stage
CLIP = 0.05  # clips gradients, whose norms are 0.4 to 0.6
ADAMW: dict[str, Any] = {"weight_decay": 0.5, "eps": 1e-5}
OPTIMIZER = OptimizerConfig(lr=1e-4, warmup_steps=1, schedule="constant", grad_clip=CLIP, **ADAMW)
PROBE = np.arange(20, 36, dtype=np.int32)


def second(optimizer: OptimizerConfig) -> OptimizerConfig:
    """Return the optimizer settings of the second stage."""
    return optimizer.model_copy(update={"lr": optimizer.lr * 1.5, "betas": BETAS, "warmup_steps": 2})


def rate(step: int, optimizer: OptimizerConfig = OPTIMIZER) -> float:
    """Return the learning rate of a step, counted from 1."""
    return optimizer.lr if step <= BOUNDARY else second(optimizer).lr * min(1, (step - BOUNDARY) / 2)


def settings(model: Path, stage: int, ranks: int, dtype: str = "float32", **changes: Any) -> LearnerSettings:
    """changes: other values of the learner's configuration."""
    usual = {"micro_batch_tokens": 100, "optimizer": OPTIMIZER}
    config = LearnerConfig(ranks=ranks, zero_stage=stage, threads=1, **usual | changes)
    return LearnerSettings(
        model=str(model),
        dtype=dtype,
        device="cpu",
        seed=0,
        config=config,
        stages=(
            StageSettings(0, BOUNDARY, (LOSS,), config.optimizer),
            StageSettings(BOUNDARY, 4, (LOSS,), second(config.optimizer)),
        ),
        teacher=TeacherConfig(alpha=ALPHA),
    )


def spoiled(samples: list[TrainingSequence]) -> list[TrainingSequence]:
    """Set one of the teacher's log-probs to NaN."""
    assert samples[2].teacher is not None
    samples[2].teacher.logprobs[-1, 0] = np.nan
    return samples


def apart(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Return the Euclidean distance over all parameters."""
    return float(np.sqrt(sum(np.square(ours[n].astype(np.float64) - theirs[n]).sum() for n in ours)))


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> np.ndarray:
    """Return the changes of all parameters, concatenated."""
    return np.concatenate([(after[name] - before[name]).astype(np.float64).ravel() for name in sorted(before)])


def worst(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def assert_equal(
    student: dict[str, np.ndarray], teacher: dict[str, np.ndarray], plain: Reference, before: dict[str, np.ndarray]
) -> None:
    """Check student and teacher against the reference. The difference is tiny beside the change since `before`."""
    for ours, theirs in (
        (student, {n: p.numpy() for n, p in plain.weights().items()}),
        (teacher, {n: p.numpy() for n, p in plain.teacher.items()}),
    ):
        assert worst(ours, theirs) < 1e-5
        assert apart(ours, theirs) < 1e-3 * apart(ours, before)


def test_a_learning_rate_rises_and_falls_or_stays() -> None:
    def rates(schedule: str, warmup_steps: int, steps: int) -> list[float]:
        config = OptimizerConfig.model_validate({"lr": 1, "warmup_steps": warmup_steps, "schedule": schedule})
        return [learning_rate(step, steps, config) for step in range(1, steps + 1)]

    assert rates("cosine", 2, 6) == pytest.approx([0.5, 1, 1, 0.8536, 0.5, 0.1464], abs=1e-4)
    assert rates("constant", 2, 4) == [0.5, 1, 1, 1]
    assert rates("cosine", 10, 3) == [0.5, 1, 1]  # a warm-up as long as the run would leave no step at full rate


Steps = tuple[Reference, list[dict[str, float]]]


def plain_steps(model: Path, alpha: float, keep_moments: bool) -> Steps:
    """Return the reference after its steps, and the figures of each step."""
    plain, figures = Reference(model, alpha, cap=2.0, clip=CLIP, **ADAMW), []
    for seed in range(STEPS):
        if seed == BOUNDARY:
            plain.begin_stage(BETAS, keep_moments)
        loss = plain.step(make_rollouts(model, 7, K, seed, SKIP), rate(seed + 1))
        figures.append(plain.figures | {"loss": loss})
    return plain, figures


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Steps:
    return plain_steps(tiny_model, ALPHA, keep_moments=False)


@pytest.mark.parametrize(
    ("stage", "ranks", "frozen"),  # a frozen teacher; AdamW also keeps its moments then
    [(0, 1, False), (0, 1, True), (2, 1, False), (3, 1, False), (1, 2, False)],
)
def test_three_steps_equal_plain_torch(
    ray_cluster: None, tiny_model: Path, reference: Steps, stage: int, ranks: int, frozen: bool
) -> None:
    """Losses, parameters and EMA teacher, over several micro-batches. One sequence is shorter than the skipped part.

    A batch whose gradient is not finite changes nothing.

    The last step is the first of a second stage: the teacher equals the student again, and AdamW starts with new
    settings. test_learner_state compares other ZeRO stages and ranks with the same reference.
    """
    plain, figures = plain_steps(tiny_model, 0.0, keep_moments=True) if frozen else reference
    given = settings(tiny_model, stage, ranks)
    if frozen:
        stages = (given.stages[0], replace(given.stages[1], keep_moments=True))
        given = replace(given, stages=stages, teacher=TeacherConfig(weights="frozen", alpha=ALPHA))

    async def run() -> None:
        group = await LearnerGroup.start(given, PROBE, [{"num_cpus": 0.5}] * ranks)
        before = await group.parameters("student")
        for seed, expected in enumerate(figures):
            if seed == BOUNDARY:
                for _ in range(2):  # twice, as after a restart in between; the effect is that of one call
                    await group.begin_stage()
            result = await group.train_step(make_rollouts(tiny_model, 7, K, seed, SKIP))
            assert result.loss == pytest.approx(expected["loss"], rel=1e-5)
            assert result.lr == rate(seed + 1)
            assert result.applied
            assert {name: getattr(result, name) for name in expected} == pytest.approx(expected, rel=1e-4)
        student, teacher = await group.parameters("student"), await group.parameters("teacher")
        assert_equal(student, teacher, plain, before)
        assert apart(student, teacher) > 0.2 * apart(student, before)
        result = await group.train_step(spoiled(make_rollouts(tiny_model, 7, K, STEPS, SKIP)))
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
    """Optimizer state must exist without a step that was taken: sending the teacher and saving read it."""

    async def run() -> None:
        group = await LearnerGroup.start(settings(tiny_model, stage, 1, dtype), PROBE, [{"num_cpus": 0.5}])
        before = await group.parameters("student")
        assert not (await group.train_step(spoiled(make_rollouts(tiny_model, 7, K, 0, SKIP)))).applied
        assert worst(await group.parameters("teacher"), before) == 0
        await group.save(tmp_path)
        await group.written()
        assert (await group.train_step(make_rollouts(tiny_model, 7, K, 1, SKIP))).applied
        assert await group.load(tmp_path) == 1
        assert worst(await group.parameters("student"), before) == 0
        for worker in group.workers:
            worker.__ray_terminate__.remote()

    asyncio.run(run())


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_in_bfloat16_equal_those_in_float32_up_to_rounding(
    ray_cluster: None, tiny_model: Path, reference: Steps, ranks: int
) -> None:
    """A single rank adds up gradients without DeepSpeed's reduction: none of several micro-batches is lost."""
    plain, figures = reference
    begun = {name: tensor.numpy() for name, tensor in Reference(tiny_model, ALPHA, 2.0, CLIP).weights().items()}

    async def run() -> None:
        group = await LearnerGroup.start(settings(tiny_model, 1, ranks, "bfloat16"), PROBE, [{"num_cpus": 0.5}] * ranks)
        before = await group.parameters("student")
        for seed, expected in enumerate(figures):
            if seed == BOUNDARY:
                await group.begin_stage()
            result = await group.train_step(make_rollouts(tiny_model, 7, K, seed, SKIP))
            assert result.loss == pytest.approx(expected["loss"], rel=0.01)
            assert result.grad_norm == pytest.approx(expected["grad_norm"], rel=0.02)
        for role, theirs in (("student", plain.weights()), ("teacher", plain.teacher)):
            ours = moved(before, await group.parameters(role))
            exact = moved(begun, {name: tensor.numpy() for name, tensor in theirs.items()})
            assert float(ours @ exact) > 0.98 * np.linalg.norm(ours) * np.linalg.norm(exact)
            assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(exact), rel=0.01)
        for worker in group.workers:
            worker.__ray_terminate__.remote()

    asyncio.run(run())
