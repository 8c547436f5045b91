"""Weights through shared memory: every engine of a node maps one copy.

    on the learner's node   the learner's memory ─► mapped by each engine
    on another node         the learner's memory ─► Ray's object store ─► a relay's memory ─► mapped by each engine

The object store gets the bytes once for all nodes, a relay once for all engines of its node.
"""

import asyncio
import mmap
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorUnschedulableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sdft.actors.remote import Remote, RemoteActor
from sdft.actors.shared.changes import apply
from sdft.actors.shared.process import anonymous_memory
from sdft.actors.shared.types import LearnerLost, Snapshot, UpdateReport
from sdft.actors.shared.waiting import within
from sdft.actors.transport.protocol import Destination, Learner, WeightTransport


class SnapshotRelay:
    """Ray actor that holds one copy per role, as the learner's publisher holds the originals."""

    def __init__(self) -> None:
        self._buffers: dict[str, tuple[int, mmap.mmap]] = {}

    def store(self, role: str, payload: Sequence[ray.ObjectRef]) -> str:
        """Overwrite the role's copy with `payload`, a list of one reference. Returns the path to map the copy from."""
        data: np.ndarray = ray.get(payload[0])  # a view into the node's object store
        held = self._buffers.get(role)
        if held is not None and len(held[1]) != data.nbytes:
            del self._buffers[role]
            held[1].close()
            os.close(held[0])  # an engine that has mapped it keeps the memory until it has loaded it
            held = None
        if held is None:
            self._buffers[role] = held = anonymous_memory(f"sdft-relay-{role}", data.nbytes)
        np.copyto(np.frombuffer(held[1], np.uint8), data)
        return f"/proc/{os.getpid()}/fd/{held[0]}"

    def apply(self, role: str, found: Sequence[ray.ObjectRef]) -> str:
        """Overwrite the role's copy where `found`, a list of one reference to Changes, differs. Returns its path."""
        held = self._buffers[role]
        apply(ray.get(found[0]), np.frombuffer(held[1], np.uint8))
        return f"/proc/{os.getpid()}/fd/{held[0]}"


def _relay(node: str) -> Remote:
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return RemoteActor(ray.remote(SnapshotRelay).options(num_cpus=0, scheduling_strategy=place).remote())


@dataclass
class NodeCopy:
    """The copy of the snapshot on a node other than the learner's."""

    relay: Remote
    of: Snapshot | None = None  # the original; None: nothing copied
    path: str = ""


class MemoryTransport(WeightTransport):
    """Delivers snapshots through the shared memory of the engine's node."""

    def __init__(
        self,
        role: str,
        learner: Callable[[], Learner],
        notice: Callable[[str], None],
        relay: Callable[[str], Remote] = _relay,
    ) -> None:
        """relay(node): starts the relay of a node."""
        super().__init__(role, learner, notice)
        self._relay = relay
        self._copies: dict[str, NodeCopy] = {}
        self._copying: dict[str, asyncio.Lock] = {}
        self._putting = asyncio.Lock()
        self._stored: tuple[Snapshot, list[Any]] | None = None  # a snapshot, and its bytes in Ray's object store

    @asynccontextmanager
    async def sending(
        self, snapshot: Snapshot, engines: Sequence[Destination], timeout_s: float
    ) -> AsyncIterator[None]:
        """Keep the snapshot in the object store while engines load it. Late joiners request it again."""
        try:
            yield
        finally:
            self._stored = None

    async def deliver(self, snapshot: Snapshot, engine: Destination, timeout_s: float) -> UpdateReport:
        """Let an engine map the snapshot on its node. RayActorError also if no relay can run there."""
        node = engine.process.node
        local = await self._on(node, snapshot, timeout_s)
        try:
            return await super().deliver(local, engine, timeout_s)
        except FileNotFoundError:
            if local is snapshot:
                raise  # the snapshot was lost with the learner
            self.vacated(node)  # the copy was lost with the node's relay
            return await super().deliver(await self._on(node, snapshot, timeout_s), engine, timeout_s)

    def vacated(self, node: str) -> None:
        """End the node's relay. The next engine there gets a new one."""
        copy = self._copies.pop(node, None)
        if copy is not None:
            copy.relay.kill()

    def stop(self) -> None:
        """End the relays."""
        for node in list(self._copies):
            self.vacated(node)

    async def _on(self, node: str, snapshot: Snapshot, timeout_s: float) -> Snapshot:
        """Return the snapshot with a path that is valid on `node`.

        FileNotFoundError if it was lost with the learner. RayActorError if no relay can run on the node, which is lost
        then.
        """
        if node == snapshot.node:
            return snapshot
        async with self._copying.setdefault(node, asyncio.Lock()):
            copy = self._copies.get(node)
            if copy is None or copy.of is not snapshot:
                if copy is not None:
                    try:
                        await self._copy_to_relay(copy, snapshot, node, timeout_s)
                    except RayActorError:  # perhaps only the relay has died
                        self.vacated(node)
                        copy = None
                if copy is None:
                    stored = await self._stored_bytes(snapshot, timeout_s)
                    copy = self._copies[node] = NodeCopy(self._relay(node))
                    try:
                        await self._in_relay(copy, snapshot, node, timeout_s, "store", stored)
                    except (RayActorError, ActorUnschedulableError) as error:
                        self.vacated(node)
                        raise RayActorError from error
        return replace(snapshot, node=node, path=copy.path, handle=())

    async def _stored_bytes(self, snapshot: Snapshot, timeout_s: float) -> list[Any]:
        """The snapshot's bytes in Ray's object store: put there once for all nodes."""
        async with self._putting:
            if self._stored is None or self._stored[0] is not snapshot:
                try:
                    self._stored = snapshot, await self.learner().payload(snapshot.role)
                except LearnerLost as error:
                    raise FileNotFoundError(str(error)) from error
            return self._stored[1]

    async def _copy_to_relay(self, copy: NodeCopy, snapshot: Snapshot, node: str, timeout_s: float) -> None:
        """Bring the relay's copy to the snapshot's version."""
        stored = await self._stored_bytes(snapshot, timeout_s)
        await self._in_relay(copy, snapshot, node, timeout_s, "store", stored)

    async def _in_relay(
        self, copy: NodeCopy, snapshot: Snapshot, node: str, timeout_s: float, method: str, sent: list[Any]
    ) -> None:
        """Let the relay take what has been sent, by one of its methods."""
        what = f"{snapshot.role} weights v{snapshot.version} to reach node {node}"
        copy.path = await within(copy.relay.call(method, snapshot.role, sent), timeout_s, what)
        copy.of = snapshot
