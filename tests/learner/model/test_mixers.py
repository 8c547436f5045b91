"""Ranks of ZeRO stage 3 compute packs of different numbers of sequences with layers that carry a state."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from sdft.learner.group import LearnerGroup
from tests.fakes.rollouts import make_rollouts
from tests.learner.test_learner_step import PROBE, K, settings
from tests.models.families import FAMILIES, make_family_model


def test_ranks_of_zero_3_with_other_numbers_of_sequences_step_as_one_rank(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    """The parameters are so large that DeepSpeed divides them. A rank with another number of collectives would hang."""
    family = replace(FAMILIES["LFM2"], settings=FAMILIES["LFM2"].settings | {"hidden_size": 512, "conv_dim": 512})
    model = make_family_model(family, tmp_path / "m", tiny_model)

    async def losses(stage: int, ranks: int) -> list[float]:
        given = settings(model, stage, ranks)
        given = replace(given, config=given.config.model_copy(update={"step_timeout_s": 60}))
        group = await LearnerGroup.start(given, PROBE, [{"num_cpus": 0.5}] * ranks)
        found = [(await group.train_step(make_rollouts(model, 7, K, seed))).loss for seed in range(2)]
        for worker in group.workers:
            worker.__ray_terminate__.remote()
        return found

    one = asyncio.run(losses(0, 1))
    assert asyncio.run(losses(3, 2)) == pytest.approx(one, rel=1e-5)
