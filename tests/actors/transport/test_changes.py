"""Changes on their way to other nodes: the same bytes as the whole, which a node gets that lacks the version before."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from sdft.actors.shared.types import LearnerLost, Process, Snapshot, SnapshotDamaged, UpdateReport
from sdft.actors.transport.changes import ChangesSender, ChangesTransport
from sdft.actors.transport.protocol import Destination
from tests.actors.transport.test_memory import snapshot

NBYTES = 20_001


class Learner:
    """Publishes versions, each with some other bytes. The sender is the real one."""

    def __init__(self) -> None:
        self.end = ChangesSender()
        self.payload_bytes = np.random.default_rng(0).integers(0, 256, NBYTES, dtype=np.uint8)
        self.version, self.whole, self.parts, self.lost = 0, 0, 0, False

    def publish(self, places: slice = slice(100, 200)) -> Snapshot:
        self.version += 1
        self.payload_bytes[places] += 1
        return self.end.offer(snapshot(self.version, NBYTES), self.payload_bytes)

    async def payload(self, role: str) -> list[Any]:
        self.whole += 1
        return [ray.put(self.payload_bytes)]

    async def sender(self, method: str, seconds: float, what: str, *arguments: Any) -> Any:
        if self.lost:
            raise LearnerLost("learner rank 0 died")
        found = getattr(self.end, method)(*arguments)
        self.parts += found is not None
        return found


async def arrive(
    transport: ChangesTransport, original: Snapshot, nodes: tuple[str, ...], error: Exception | None = None
) -> list[bytes]:
    """Return the bytes that an engine on each node reads, in a relay of its own on this machine."""

    async def call(method: str, local: Snapshot) -> UpdateReport:
        if error is not None:
            raise error
        read.append(Path(local.path).read_bytes())
        return UpdateReport(local.version, 0.0, 0.0)

    read: list[bytes] = []
    engines = [Destination("student engine 0", Process(1, node), call) for node in nodes]
    async with transport.sending(original, engines, 60):
        await asyncio.gather(*(transport.deliver(original, engine, 60) for engine in engines))
    return read


def transport_of(learner: Learner) -> ChangesTransport:
    """Relays of all nodes run here."""
    from sdft.actors.transport.memory import _relay

    here = ray.get_runtime_context().get_node_id()
    return ChangesTransport("student", lambda: learner, print, lambda node: _relay(here))


def test_nodes_get_the_first_version_whole_and_the_changes_of_others(ray_cluster: None) -> None:
    async def run() -> None:
        learner = Learner()
        transport = transport_of(learner)
        for version in (1, 2, 3):
            read = await arrive(transport, learner.publish(), ("a", "a", "b"))
            assert read == [learner.payload_bytes.tobytes()] * 3
            assert (learner.whole, learner.parts) == (1, version - 1)
        read = await arrive(transport, learner.publish(), ("a", "b", "new"))
        assert read == [learner.payload_bytes.tobytes()] * 3
        assert (learner.whole, learner.parts) == (2, 3)  # whole for the new node alone
        original = learner.publish()
        await arrive(transport, original, ("a", "b"))
        assert await arrive(transport, original, ("later",)) == [learner.payload_bytes.tobytes()]
        assert await arrive(transport, learner.publish(), ("later", "new")) == [learner.payload_bytes.tobytes()] * 2
        assert (learner.whole, learner.parts) == (4, 5)  # "new" lacks the version before, so it gets the whole
        transport.stop()

    asyncio.run(run())


def test_what_changes_much_is_sent_whole(ray_cluster: None) -> None:
    async def run() -> None:
        learner = Learner()
        transport = transport_of(learner)
        for version in (1, 2):
            assert await arrive(transport, learner.publish(slice(None)), ("a",)) == [learner.payload_bytes.tobytes()]
            assert (learner.whole, learner.parts) == (version, 0)
        transport.stop()

    asyncio.run(run())


def test_a_lost_relay_and_a_damaged_copy_are_followed_by_the_whole(ray_cluster: None) -> None:
    async def run() -> None:
        learner = Learner()
        transport = transport_of(learner)
        await arrive(transport, learner.publish(), ("a",))
        transport._copies["a"].relay.kill()
        assert await arrive(transport, learner.publish(), ("a",)) == [learner.payload_bytes.tobytes()]
        assert learner.whole == 2
        with pytest.raises(SnapshotDamaged):
            await arrive(transport, learner.publish(), ("a",), SnapshotDamaged("w"))
        assert await arrive(transport, learner.publish(), ("a",)) == [learner.payload_bytes.tobytes()]
        assert learner.whole == 3
        transport.stop()

    asyncio.run(run())


def test_changes_lost_with_the_learner_raise_file_not_found(ray_cluster: None) -> None:
    async def run() -> None:
        learner = Learner()
        learner.lost = True
        with pytest.raises(FileNotFoundError, match="learner rank 0 died"):
            await arrive(transport_of(learner), learner.publish(), ("a",))

    asyncio.run(run())
