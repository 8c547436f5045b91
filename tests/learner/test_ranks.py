"""What ranks on GPUs may do otherwise, with the same bits: here with gloo, on CPUs.

overlap      gradients are added up beside the backward pass
zero_group   the backward pass gathers weights from the ranks of a node
"""

import asyncio
from pathlib import Path
from typing import Any

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
@pytest.mark.parametrize(
    ("stage", "ranks", "changes"),
    [(2, 2, {"overlap": True}), (3, 2, {"overlap": True}), (3, 4, {"zero_group": 2})],
)
def test_no_bit_changes(ray_cluster: None, tiny_model: Path, stage: int, ranks: int, changes: dict[str, Any]) -> None:
    async def trained(**changes: Any) -> dict[str, np.ndarray]:
        given = settings(tiny_model, stage, ranks, **changes)
        group = await LearnerGroup.start(given, PROBE, [{"num_cpus": 0.25}] * ranks)
        for seed in range(2):
            await group.train_step(make_rollouts(tiny_model, 7, K, seed, SKIP))
        found: dict[str, np.ndarray] = await group.parameters("student")
        for worker in group.workers:
            worker.__ray_terminate__.remote()
        return found

    async def run() -> float:
        return worst(await trained(**changes), await trained())

    assert asyncio.run(run()) == 0


@pytest.mark.parametrize("given", [{"ranks": 2}, {"ranks": 2, "zero_stage": 1}, {"zero_stage": 2}])
def test_an_overlap_of_nothing_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="overlap needs several ranks and zero_stage 2 or 3"):
        LearnerConfig(overlap=True, **given)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"zero_group": 2, "ranks": 4}, "zero_group divides the weights, as zero_stage 3 does"),
        ({"zero_group": 2, "ranks": 3, "zero_stage": 3}, "zero_group 2 must divide ranks 3 into several groups"),
        ({"zero_group": 2, "ranks": 2, "zero_stage": 3}, "zero_group 2 must divide ranks 2 into several groups"),
    ],
)
def test_a_group_of_no_use_is_refused(given: dict[str, int], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        LearnerConfig(**given)


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
