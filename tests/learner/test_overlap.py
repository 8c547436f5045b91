"""Gradients that are added up beside the backward pass: the same bits. With gloo, where nothing runs beside it."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from sdft.learner.config import LearnerConfig
from sdft.learner.group import LearnerGroup
from sdft.services.base.errors import UserError
from sdft.services.config.load import load_config
from tests.fakes.rollouts import make_rollouts
from tests.learner.test_learner_step import PROBE, SKIP, K, settings, worst


@pytest.mark.whole
@pytest.mark.parametrize("stage", [2, 3])
def test_an_overlap_changes_no_bit(ray_cluster: None, tiny_model: Path, stage: int) -> None:
    async def trained(overlap: bool) -> dict[str, np.ndarray]:
        given = settings(tiny_model, stage, 2, overlap=overlap)
        group = await LearnerGroup.start(given, PROBE, [{"num_cpus": 0.5}] * 2)
        for seed in range(2):
            await group.train_step(make_rollouts(tiny_model, 7, K, seed, SKIP))
        found: dict[str, np.ndarray] = await group.parameters("student")
        for worker in group.workers:
            worker.__ray_terminate__.remote()
        return found

    async def run() -> float:
        return worst(await trained(overlap=True), await trained(overlap=False))

    assert asyncio.run(run()) == 0


@pytest.mark.parametrize("given", [{"ranks": 2}, {"ranks": 2, "zero_stage": 1}, {"zero_stage": 2}])
def test_an_overlap_of_nothing_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="overlap needs several ranks and zero_stage 2 or 3"):
        LearnerConfig(overlap=True, **given)


@pytest.mark.parametrize(
    ("learner", "why"),
    [
        (
            "{overlap: true, ranks: 2, zero_stage: 2}",
            r"overlap lets a GPU compute while gradients are sent, .* remove it",
        ),
        ("{deterministic: false}", r"deterministic false saves nothing with device: cpu; remove it"),
    ],
)
def test_on_a_cpu_settings_for_gpus_are_refused(learner: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\ndata: {{train: a.jsonl}}\ntraining: {{steps: 1}}\nlearner: {learner}\n")
    with pytest.raises(UserError, match=rf"learner\.{why}"):
        load_config(path)
