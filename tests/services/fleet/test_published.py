"""A snapshot on its way to other nodes than the learner's: sent once per node, into memory that its engines can map."""

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from sdft.actors.relay import SnapshotRelay
from sdft.actors.shared.types import Snapshot
from sdft.learner.group import LearnerLost
from sdft.services.fleet.snapshots import Published
from simulation.engine import Relay

NOTHING = np.zeros(0, dtype=np.int32)


def snapshot(version: int, nbytes: int) -> Snapshot:
    """Return the snapshot of a learner on another node."""
    return Snapshot("student", version, "/nowhere", "another node", nbytes, (), NOTHING, NOTHING.astype(np.float32))


class Learner:
    """Returns a payload of equal bytes, and counts the requests."""

    def __init__(self) -> None:
        self.asked, self.value, self.nbytes, self.lost = 0, 1, 1000, False

    async def payload(self, role: str) -> list[ray.ObjectRef]:
        self.asked += 1
        if self.lost:
            raise LearnerLost("learner rank 0 died")
        return [ray.put(np.full(self.nbytes, self.value, np.uint8))]


def test_all_engines_of_a_node_map_one_copy_that_was_fetched_once(ray_cluster: None) -> None:
    async def run() -> None:
        learner, here = Learner(), ray.get_runtime_context().get_node_id()
        published = Published(learner.payload)
        for version, nbytes in ((1, 1000), (2, 1000), (3, 5000)):
            learner.value, learner.nbytes = version, nbytes
            published.set_newest(snapshot(version, nbytes), timeout_s=60)
            copies = await asyncio.gather(*(published.snapshot_on(here) for _ in range(4)))
            assert learner.asked == version
            assert {copy.path for copy in copies} == {copies[0].path}
            assert (copies[0].version, copies[0].nbytes, copies[0].node) == (version, nbytes, here)
            assert Path(copies[0].path).read_bytes() == bytes([version]) * nbytes
        assert await published.snapshot_on("another node") is published.newest
        published.stop()

    asyncio.run(run())


def test_a_relay_keeps_one_buffer_a_role_whatever_was_sent_before(ray_cluster: None) -> None:
    """A buffer of another size replaces the one before, which is closed."""
    relay = SnapshotRelay()
    for nbytes in (1000, 5000, 5000, 3000):
        path = relay.store("student", [ray.put(np.full(nbytes, 7, np.uint8))])
        assert Path(path).read_bytes() == bytes([7]) * nbytes
    open_ones = [fd for fd in Path("/proc/self/fd").iterdir() if fd.exists() and "sdft-relay" in os.readlink(fd)]
    assert {fd.stat().st_ino for fd in open_ones} == {Path(path).stat().st_ino}
    assert Path("/proc/self/maps").read_text().count("sdft-relay") == 1


def test_the_death_of_a_relay_is_not_the_loss_of_an_engine(ray_cluster: None) -> None:
    async def run() -> None:
        learner, here = Learner(), ray.get_runtime_context().get_node_id()
        published = Published(learner.payload)
        published.set_newest(snapshot(1, 1000), timeout_s=60)
        await published.snapshot_on(here)
        published._copies[here].relay.kill()
        published.set_newest(snapshot(2, 1000), timeout_s=60)
        assert Path((await published.snapshot_on(here)).path).exists()
        published.stop()

    asyncio.run(run())


def test_all_nodes_share_one_copy_in_the_object_store(ray_cluster: None) -> None:
    async def run() -> None:
        learner, relays = Learner(), list[Relay]()

        def relay(node: str) -> Relay:
            relays.append(Relay(node))
            return relays[-1]

        published = Published(learner.payload, relay)
        for version in (1, 2):
            published.set_newest(snapshot(version, 1000), timeout_s=60)
            copies = await asyncio.gather(*(published.snapshot_on(node) for node in ("a", "a", "b", "c")))
            assert [copy.path for copy in copies] == ["/on/a", "/on/a", "/on/b", "/on/c"]
            assert (learner.asked, [one.calls for one in relays]) == (version, [version] * 3)
            published.drop_stored()
        with pytest.raises(RayActorError):
            await published.snapshot_on("gone")
        published.end_relay("b")
        assert [one.node for one in relays if one.killed] == ["b", "gone"]

    asyncio.run(run())


def test_weights_lost_with_the_learner_raise_file_not_found(ray_cluster: None) -> None:
    async def run() -> None:
        learner = Learner()
        learner.lost = True
        published = Published(learner.payload)
        published.set_newest(snapshot(1, 1000), timeout_s=60)
        with pytest.raises(FileNotFoundError, match="student weights v1: learner rank 0 died"):
            await published.snapshot_on(ray.get_runtime_context().get_node_id())

    asyncio.run(run())
