"""A role's newest weights: given to all engines when they are published, and to those that come later.

    async with published.lock:                      # from publication until no engine loads any more
        published.new(await learner.publish(...))   # then every engine loads published.on(its node)

The memory of a snapshot is overwritten by the next, so whoever loads one later takes the lock for that time.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.relay import SnapshotRelay
from actors.types import Snapshot
from learner.group import LearnerLost
from learner.waiting import within
from services.remote import Remote, RemoteActor

Payload = Callable[[str], Awaitable[list[ray.ObjectRef]]]  # of a role: its snapshot's bytes in Ray's object store


@dataclass
class _Copy:
    """What another node has of a role."""

    relay: Remote
    of: Snapshot | None = None  # the original
    path: str = ""


class Published:
    """The newest snapshot of one role."""

    def __init__(self, payload: Payload) -> None:
        self.lock = asyncio.Lock()
        self.newest: Snapshot | None = None  # None: the model as it was loaded
        self.timeout_s = 0.0  # of loading it
        self.readable = asyncio.Event()
        self.readable.set()
        self._payload = payload
        self._copies: dict[str, _Copy] = {}
        self._copying: dict[str, asyncio.Lock] = {}

    def new(self, snapshot: Snapshot, timeout_s: float) -> None:
        self.newest, self.timeout_s = snapshot, timeout_s
        self.readable.set()

    def forget(self) -> None:
        """Its publisher has died, and its memory with it: whoever comes does nothing before there is another."""
        self.readable.clear()

    async def on(self, node: str) -> Snapshot:
        """The newest snapshot with a path that is valid on `node`.

        FileNotFoundError if it went with its publisher, RayActorError if the node's relay is lost, as with its node.
        """
        snapshot = self.newest
        assert snapshot is not None
        if node == snapshot.node:
            return snapshot
        async with self._copying.setdefault(node, asyncio.Lock()):
            copy = self._copies.get(node)
            if copy is None or copy.of is not snapshot:
                try:
                    reference = await self._payload(snapshot.role)
                except LearnerLost as error:
                    raise FileNotFoundError(f"{snapshot.role} weights v{snapshot.version}: {error}") from error
                if copy is None:
                    copy = self._copies[node] = _Copy(_relay(node))
                what = f"{snapshot.role} weights v{snapshot.version} to reach node {node}"
                try:
                    copy.path = await within(copy.relay.call("hold", snapshot.role, reference), self.timeout_s, what)
                except (RayActorError, ActorUnschedulableError) as error:
                    del self._copies[node]  # the next engine there begins with another
                    raise RayActorError from error
                copy.of = snapshot
        return replace(snapshot, node=node, path=copy.path)

    def stop(self) -> None:
        """End the relays."""
        for copy in self._copies.values():
            copy.relay.kill()


def _relay(node: str) -> Remote:
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return RemoteActor(ray.remote(SnapshotRelay).options(num_cpus=0, scheduling_strategy=place).remote())
