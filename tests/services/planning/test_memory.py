"""The learner's memory as `sdft check` predicts it, compared with the peak of a real learner."""

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.learner_step import COMPLETION, LOSS, PROMPT, samples
from benchmarks.measure import resident_kib
from sdft.actors.shared.process import GIB
from sdft.learner.config import LearnerConfig, LoraConfig, TeacherConfig
from sdft.learner.group import LearnerGroup
from sdft.learner.types import LearnerSettings, StageSettings
from sdft.services.config.dtype import native_dtype
from sdft.services.planning.memory import learner_gib
from sdft.services.planning.shape import ModelShape, read_headers

BASE = LearnerConfig(micro_batch_tokens=8192)
NATIVE = native_dtype("cpu")  # the other dtype may take minutes on this machine


@pytest.fixture(scope="module")
def plain(ray_cluster: None, smollm2: Path) -> tuple[float, list[int]]:
    """What `measured` returns for the default settings: five small steps, then two of the size that is predicted."""
    return asyncio.run(measured(smollm2, NATIVE, BASE, [2] * 5 + [5] * 2))


def predicted(model: Path, dtype: str, config: LearnerConfig, sequences: int) -> float:
    """Return the peak in GiB as `sdft check` predicts it for steps of so many sequences."""
    shape = ModelShape.of(model, read_headers(model), config.lora)
    tokens, rows = sequences * (PROMPT + COMPLETION), sequences * COMPLETION
    return learner_gib(config, TeacherConfig(), dtype, shape, tokens, rows, PROMPT + COMPLETION)


@pytest.mark.whole
def test_the_predicted_peak_of_default_settings_is_within_15_percent_of_the_measured_one(
    plain: tuple[float, list[int]], smollm2: Path
) -> None:
    assert predicted(smollm2, NATIVE, BASE, 5) == pytest.approx(plain[0], rel=0.15)


@pytest.mark.whole
def test_most_steps_of_a_learner_allocate_no_new_memory(plain: tuple[float, list[int]]) -> None:
    # 20 MiB. A gradient of the head alone, freed and allocated again, is 14,000 pages. The heap may grow in a single
    # step.
    assert statistics.median(plain[1][:5]) < 5000


@pytest.mark.whole
@pytest.mark.parametrize(
    ("dtype", "config", "sequences"),
    [
        ("float32", BASE.model_copy(update={"zero_stage": 2}), 4),
        (NATIVE, BASE.model_copy(update={"gradient_checkpointing": True}), 8),
        (NATIVE, BASE.model_copy(update={"lora": LoraConfig()}), 5),
    ],
)
def test_the_predicted_peak_is_within_15_percent_of_the_measured_one(
    ray_cluster: None, smollm2: Path, dtype: str, config: LearnerConfig, sequences: int
) -> None:
    peak, _ = asyncio.run(measured(smollm2, dtype, config, [sequences] * 2))
    assert predicted(smollm2, dtype, config, sequences) == pytest.approx(peak, rel=0.15)


async def measured(model: Path, dtype: str, config: LearnerConfig, sequences: Sequence[int]) -> tuple[float, list[int]]:
    """Return the peak of a learner's resident memory in GiB, and the pages that the kernel gave it in each step.

    sequences: of each step.
    """
    settings = LearnerSettings(
        str(model), dtype, "cpu", 0, config, (StageSettings(0, 10, (LOSS,), config.optimizer),), TeacherConfig()
    )
    group = await LearnerGroup.start(settings, np.arange(100, 148, dtype=np.int32), [{"num_cpus": 1}])
    new_pages = []
    for step, number in enumerate(sequences):
        before = page_faults(group.pids[0])
        await group.train_step(samples(number))
        new_pages.append(page_faults(group.pids[0]) - before)
        for role in ("student", "teacher"):
            await group.publish(role, step)
    peak = resident_kib("VmHWM", group.pids[0]) * 1024 / GIB
    group.workers[0].__ray_terminate__.remote()
    return peak, new_pages


def page_faults(pid: int) -> int:
    """Return the number of pages that the kernel has given a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[7])


def test_a_lora_teacher_that_becomes_the_student_at_each_stage_keeps_its_change_in_float32() -> None:
    shape = ModelShape(parameters=0, layers=1, hidden=8, intermediate=8, vocabulary=8, heads=1, adapted=2**30)
    lora = BASE.model_copy(update={"lora": LoraConfig()})

    def gib(weights: str, stages: int) -> float:
        teacher = TeacherConfig.model_validate(
            {"weights": weights} | ({"refresh_every": 1} if weights == "gated" else {})
        )
        return learner_gib(lora, teacher, NATIVE, shape, 1, 1, 1, stages)

    assert gib("frozen", 2) - gib("frozen", 1) == pytest.approx(4)
    assert gib("gated", 1) == gib("gated", 2) == gib("frozen", 2)
    assert gib("base", 2) == gib("base", 1)
    assert gib("ema", 2) == gib("ema", 1)
