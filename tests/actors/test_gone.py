"""A process that Ray's memory monitor ends is a lost process: an engine is replaced, a learner rank is named."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.exceptions import OutOfMemoryError, RayActorError

from sdft.actors.gone import NO_MEMORY, how_it_ended
from sdft.actors.remote import RemoteActor
from sdft.learner.group import LearnerGroup, LearnerLost
from tests.learner.test_learner_step import PROBE, settings


@pytest.fixture
def full_machine(ray_ended: None) -> Iterator[None]:
    """A cluster whose memory monitor takes any use of the machine's memory as too much, and ends every worker."""
    ray.shutdown()  # the cluster that other files share; the next of them starts it again
    too_much = {"memory_usage_threshold": 0.001, "min_memory_free_bytes": -1, "memory_monitor_refresh_ms": 100}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=too_much)
    yield
    ray.shutdown()


class Slow:
    def sleep(self) -> None:
        time.sleep(60)


@pytest.mark.usefixtures("full_machine")
def test_a_call_of_a_process_that_ray_ends_for_memory_raises_as_that_of_a_dead_one(tiny_model: Path) -> None:
    async def run() -> None:
        slow = ray.remote(num_cpus=0.1)(Slow)
        with pytest.raises(OutOfMemoryError):
            await slow.remote().sleep.remote()
        with pytest.raises(RayActorError, match="running low on memory") as error:
            await RemoteActor(slow.remote()).call("sleep")
        assert how_it_ended(error.value) == NO_MEMORY
        with pytest.raises(LearnerLost, match=f"a learner process {NO_MEMORY} while it started"):
            await LearnerGroup.start(settings(tiny_model, 1, 1), PROBE, [{"num_cpus": 0.1}])

    asyncio.run(run())
