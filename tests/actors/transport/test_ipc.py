"""Snapshots on the learner's GPU: who gets the handle, who a copy, and what follows if a handle cannot be opened."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from sdft.actors.shared.types import LearnerLost, NotReceived, Process, Snapshot, UpdateReport
from sdft.actors.transport.ipc import IpcSender, IpcTransport
from sdft.actors.transport.protocol import Destination
from simulation.engine import Relay

NOTHING = np.zeros(0, dtype=np.int32)
HANDLE = (b"handle", 1000, 0)
CANNOT = "student weights v2: the engine's GPU cannot open the learner's memory; set weights.transport: broadcast"


def snapshot(version: int) -> Snapshot:
    """Return a snapshot on the GPU of a learner on the node "here"."""
    return Snapshot(
        "student", version, "", "here", 1000, (), NOTHING, NOTHING.astype(np.float32), scale=0.5, handle=HANDLE
    )


@dataclass
class Learner:
    """Counts how often its bytes are copied into main memory."""

    version: int | None = None  # that it has offered last
    lost: bool = False
    copied: int = 0

    async def payload(self, role: str) -> list[Any]:
        self.copied += 1
        return []

    async def sender(self, method: str, seconds: float, what: str, *arguments: Any) -> Any:
        if self.lost:
            raise LearnerLost("learner rank 0 died")
        assert (method, arguments) == ("offered", ("student",))
        return self.version


@dataclass
class Engine:
    """An engine on a node. It may be unable to open handles."""

    node: str
    opens: bool = True
    got: list[Snapshot] = field(default_factory=list)

    async def call(self, method: str, snapshot: Snapshot) -> UpdateReport:
        assert method == "update_weights"
        if snapshot.handle and not self.opens:
            raise NotReceived(CANNOT)
        self.got.append(snapshot)
        return UpdateReport(snapshot.version, 0.0, 0.0)

    async def load(self, transport: IpcTransport, version: Snapshot) -> None:
        await transport.deliver(version, Destination("student engine 0", Process(1, self.node), self.call), 5)


def transport_of(learner: Learner) -> IpcTransport:
    return IpcTransport("student", lambda: learner, print, Relay)


def test_engines_of_the_learners_node_get_the_handle_and_nothing_is_copied() -> None:
    """Late joiners too, which load the newest version outside `sending`."""

    async def run() -> None:
        learner, engines = Learner(), [Engine("here"), Engine("here")]
        transport = transport_of(learner)
        for version in (snapshot(1), snapshot(2)):
            async with transport.sending(version, [], 5):
                await asyncio.gather(*(engine.load(transport, version) for engine in engines))
            assert [engine.got[-1] is version for engine in engines] == [True, True]
        late = Engine("here")
        await late.load(transport, version)
        assert (late.got, learner.copied) == ([version], 0)

    asyncio.run(run())


def test_engines_of_other_nodes_get_a_copy_that_is_made_once_for_a_version() -> None:
    async def run() -> None:
        learner = Learner()
        transport = transport_of(learner)
        engines = [Engine(node) for node in ("here", "a", "a", "b")]
        for count, version in enumerate((snapshot(1), snapshot(2)), 1):
            async with transport.sending(version, [], 5):
                await asyncio.gather(*(engine.load(transport, version) for engine in engines))
            assert learner.copied == count
            assert [engine.got[-1].path for engine in engines] == ["", "/on/a", "/on/a", "/on/b"]
            assert [engine.got[-1].handle for engine in engines] == [HANDLE, (), (), ()]
            assert {(engine.got[-1].version, engine.got[-1].scale) for engine in engines} == {(count, 0.5)}
        late = Engine("c")
        await late.load(transport, version)
        assert (late.got[0].path, late.got[0].handle, learner.copied) == ("/on/c", (), 3)

    asyncio.run(run())


def test_a_handle_that_cannot_be_opened_is_the_engines_error_if_the_learner_has_the_version() -> None:
    async def run() -> None:
        learner = Learner(version=2)
        with pytest.raises(NotReceived, match=f"^{CANNOT}$"):
            await Engine("here", opens=False).load(transport_of(learner), snapshot(2))
        assert learner.copied == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("learner", "how"),
    [
        (Learner(lost=True), "learner rank 0 died"),
        (Learner(version=None), "the learner does not have student weights v2"),
        (Learner(version=1), "the learner does not have student weights v2"),
    ],
    ids=["dead", "started again", "at an earlier version"],
)
def test_a_handle_of_a_lost_learner_is_a_lost_version(learner: Learner, how: str) -> None:
    """The driver then publishes it again, or waits for the next learner."""

    async def run() -> None:
        with pytest.raises(FileNotFoundError, match=f"^{how}$"):
            await Engine("here", opens=False).load(transport_of(learner), snapshot(2))

    asyncio.run(run())


def test_a_sender_has_offered_nothing_at_its_start() -> None:
    assert IpcSender().offered("student") is None
