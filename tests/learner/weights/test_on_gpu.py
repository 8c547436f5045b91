"""A learner that packs its snapshots on its device, as with `weights.transport: ipc`. The device is the CPU here."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from sdft.actors.shared.digests import check_digests
from sdft.actors.shared.types import SnapshotDamaged
from sdft.learner.group import LearnerGroup
from tests.fakes.rollouts import make_rollouts
from tests.learner.test_learner_step import PROBE, K, settings


@pytest.mark.whole
def test_each_version_is_offered_in_one_buffer_and_copied_into_main_memory_when_it_is_asked_for(
    ray_cluster: None, tiny_model: Path
) -> None:
    async def run() -> None:
        one = replace(settings(tiny_model, 1, 1), transport="tests.fakes.kept_transport:KeptTransport")
        group = await LearnerGroup.start(one, PROBE, [{"num_cpus": 0.5}])
        before = await group.publish("student", 0)
        await group.train_step(make_rollouts(tiny_model, 7, K, 0))
        snapshot = await group.publish("student", 1)
        assert (snapshot.path, snapshot.handle) == ("", (snapshot.nbytes,))
        assert await group.sender("offered", 60, "the learner to answer", "student") == 1
        (payload,) = await group.payload("student")
        copy = ray.get(payload)
        check_digests(snapshot, copy.data, threads=1)
        with pytest.raises(SnapshotDamaged, match="student weights v0"):
            check_digests(before, copy.data, threads=1)
        assert np.abs(snapshot.probe_logprobs - before.probe_logprobs).max() > 0
        group.kill()

    asyncio.run(run())
