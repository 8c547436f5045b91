"""A snapshot on its way to other nodes than the learner's: sent once per node, into memory that its engines can map."""

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from sdft.actors.shared.types import LearnerLost, Process, Snapshot, UpdateReport
from sdft.actors.transport.memory import MemoryTransport, SnapshotRelay
from sdft.actors.transport.protocol import Destination
from simulation.engine import Relay

NOTHING = np.zeros(0, dtype=np.int32)


def snapshot(version: int, nbytes: int) -> Snapshot:
    """Return the snapshot of a learner on another node."""
    return Snapshot("student", version, "/nowhere", "another node", nbytes, (), NOTHING, NOTHING.astype(np.float32))


class Learner:
    """Returns a payload of equal bytes, and counts the requests."""

    def __init__(self) -> None:
        self.asked, self.value, self.nbytes, self.lost = 0, 1, 1000, False

    async def payload(self, role: str) -> list[Any]:
        self.asked += 1
        if self.lost:
            raise LearnerLost("learner rank 0 died")
        return [ray.put(np.full(self.nbytes, self.value, np.uint8))]

    async def sender(self, method: str, seconds: float, what: str, *arguments: Any) -> Any:
        raise AssertionError(f"shared memory needs no {method}")


def transport_of(learner: Learner) -> MemoryTransport:
    return MemoryTransport("student", lambda: learner, print)


async def delivered(transport: MemoryTransport, original: Snapshot, node: str) -> Snapshot:
    """Return the snapshot as an engine on `node` gets it."""
    got: list[Snapshot] = []

    async def call(method: str, local: Snapshot) -> UpdateReport:
        got.append(local)
        return UpdateReport(local.version, 0.0, 0.0)

    await transport.deliver(original, Destination("student engine 0", Process(1, node), call), timeout_s=60)
    return got[0]


def test_all_engines_of_a_node_map_one_copy_that_was_fetched_once(ray_cluster: None) -> None:
    async def run() -> None:
        learner, here = Learner(), ray.get_runtime_context().get_node_id()
        transport = transport_of(learner)
        for version, nbytes in ((1, 1000), (2, 1000), (3, 5000)):
            learner.value, learner.nbytes = version, nbytes
            original = snapshot(version, nbytes)
            copies = await asyncio.gather(*(delivered(transport, original, here) for _ in range(4)))
            assert learner.asked == version
            assert {copy.path for copy in copies} == {copies[0].path}
            assert (copies[0].version, copies[0].nbytes, copies[0].node) == (version, nbytes, here)
            assert Path(copies[0].path).read_bytes() == bytes([version]) * nbytes
        assert await delivered(transport, original, "another node") is original
        transport.stop()

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
        transport = transport_of(learner)
        await delivered(transport, snapshot(1, 1000), here)
        transport._copies[here].relay.kill()
        assert Path((await delivered(transport, snapshot(2, 1000), here)).path).exists()
        transport.stop()

    asyncio.run(run())


def test_all_nodes_share_one_copy_in_the_object_store() -> None:
    """After the delivery the store holds nothing: a late joiner's copy is requested again."""

    class Counting(Learner):
        async def payload(self, role: str) -> list[Any]:
            self.asked += 1
            return []

    async def run() -> None:
        learner, relays = Counting(), list[Relay]()

        def relay(node: str) -> Relay:
            relays.append(Relay(node))
            return relays[-1]

        transport = MemoryTransport("student", lambda: learner, print, relay)
        for version in (1, 2):
            original = snapshot(version, 1000)
            async with transport.sending(original, [], timeout_s=60):
                copies = await asyncio.gather(*(delivered(transport, original, node) for node in ("a", "a", "b", "c")))
            assert [copy.path for copy in copies] == ["/on/a", "/on/a", "/on/b", "/on/c"]
            assert (learner.asked, [one.calls for one in relays]) == (version, [version] * 3)
        with pytest.raises(RayActorError):
            await delivered(transport, original, "gone")
        assert learner.asked == 3
        transport.vacated("b")
        assert [one.node for one in relays if one.killed] == ["b", "gone"]

    asyncio.run(run())


def test_weights_lost_with_the_learner_raise_file_not_found() -> None:
    async def run() -> None:
        learner = Learner()
        learner.lost = True
        with pytest.raises(FileNotFoundError, match="learner rank 0 died"):
            await delivered(transport_of(learner), snapshot(1, 1000), "a node")

    asyncio.run(run())
