"""When a learner rank stops answering, the learner ends the other ranks too, and no process remains."""

import asyncio
import gc
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sdft.learner.group import LearnerGroup, LearnerLost
from sdft.learner.worker import LearnerWorker
from tests.fakes.rollouts import make_rollouts
from tests.learner.test_learner_step import PROBE, K, settings


def gone(pid: int) -> bool:
    """True if the process has ended. A zombie has an empty command line and holds no resources."""
    path = Path(f"/proc/{pid}/cmdline")
    return not path.exists() or not path.read_bytes()


def test_a_rank_that_was_stopped_is_found_and_ended_with_the_others(ray_cluster: None, tiny_model: Path) -> None:
    async def run() -> None:
        one = settings(tiny_model, 1, 2)
        impatient = replace(one, config=one.config.model_copy(update={"health_timeout_s": 2}))
        group = await LearnerGroup.start(impatient, PROBE, [{"num_cpus": 0.5}] * 2)
        os.kill(group.pids[1], signal.SIGSTOP)
        with pytest.raises(LearnerLost, match=rf"learner rank 1 \(process {group.pids[1]}\) hangs: no answer for 2 s"):
            await group.until_lost()
        deadline = time.monotonic() + 60
        while not all(map(gone, group.pids)):
            assert time.monotonic() < deadline, "a rank is still there"
            await asyncio.sleep(0.1)

    asyncio.run(run())


def test_the_death_of_a_rank_that_is_not_awaited_causes_no_asyncio_message(ray_cluster: None, tiny_model: Path) -> None:
    async def run() -> list[str]:
        said: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["message"]))
        one = settings(tiny_model, 1, 1)
        impatient = replace(one, config=one.config.model_copy(update={"health_timeout_s": 2}))
        group = await LearnerGroup.start(impatient, PROBE, [{"num_cpus": 0.5}])
        os.kill(group.pids[0], signal.SIGKILL)
        await asyncio.wait(group._watching, timeout=60)
        with pytest.raises(LearnerLost, match=r"learner rank 0 .* died"):
            await group.payload("student")
        del group
        gc.collect()
        return said

    assert asyncio.run(run()) == []


def test_a_killed_group_counts_as_lost_and_cancels_no_task(ray_cluster: None, tiny_model: Path) -> None:
    """A run whose new learner failed to start still holds the old group. A cancellation would look like a stop
    signal."""

    async def run() -> None:
        group = await LearnerGroup.start(settings(tiny_model, 1, 1), PROBE, [{"num_cpus": 0.5}])
        group.kill(hangs=True)
        with pytest.raises(LearnerLost, match=rf"a learner process \(of {group.pids[0]}\) died"):
            await group.until_lost()

    asyncio.run(run())


def test_the_rendezvous_port_is_held_until_the_ranks_meet(ray_cluster: None) -> None:
    """The import of torch between the two takes seconds."""
    worker = LearnerWorker()
    address, port = worker.rendezvous()
    with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
        other.bind((address, port))


def test_a_learner_starts_beside_a_build_that_was_killed(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    """The learner builds nothing: torch would wait for the other build without a time limit."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()

    async def run() -> None:
        environment = {"env_vars": {"TORCH_EXTENSIONS_DIR": str(tmp_path)}}
        one = settings(tiny_model, 1, 1)
        patient = replace(one, config=one.config.model_copy(update={"start_timeout_s": 60}))
        group = await LearnerGroup.start(patient, PROBE, [{"num_cpus": 0.5, "runtime_env": environment}])
        group.kill()

    asyncio.run(run())
    assert list(tmp_path.rglob("*")) == [lock.parent, lock]


def test_a_snapshot_is_sent_in_the_middle_of_a_step(ray_cluster: None, tiny_model: Path) -> None:
    """Otherwise engines would get no weights during a step."""

    async def run() -> None:
        one = replace(settings(tiny_model, 1, 1), transport="broadcast")
        group = await LearnerGroup.start(one, PROBE, [{"num_cpus": 0.5}])
        await group.publish("student", 0)
        steps = [asyncio.ensure_future(group.train_step(make_rollouts(tiny_model, 7, K, i))) for i in range(20)]
        await asyncio.sleep(0)
        await group.payload("student")
        await group.sender("meet", 60, "the learner to find a port", "student")
        assert not steps[-1].done()
        await asyncio.gather(*steps)
        group.kill()

    asyncio.run(run())
