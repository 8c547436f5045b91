"""The newest snapshot of a role: all engines load it when it is published, and late joiners when they start.

    async with published.lock:                      # from publication until no engine loads any more
        published.set_newest(await learner.publish(...))   # then every engine loads published.snapshot_on(its node)

The next snapshot overwrites the memory of the last, so a late joiner holds the lock while it loads.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sdft.actors.relay import SnapshotRelay
from sdft.actors.shared.types import Snapshot
from sdft.actors.shared.waiting import within
from sdft.learner.group import LearnerLost
from sdft.services.fleet.remote import Remote, RemoteActor

Payload = Callable[[str], Awaitable[list[ray.ObjectRef]]]  # payload(role): the snapshot's bytes in Ray's object store


@dataclass
class _Copy:
    """The copy of a role's snapshot on a node other than the learner's."""

    relay: Remote
    of: Snapshot | None = None  # the original; None: nothing copied
    path: str = ""


class Published:
    """The newest snapshot of one role."""

    def __init__(self, payload: Payload, relay: Callable[[str], Remote] | None = None) -> None:
        """payload: see Payload. relay(node): starts the relay of a node; None: a Ray actor."""
        self.lock = asyncio.Lock()
        self.newest: Snapshot | None = None  # None: engines serve the model that they started with
        self.timeout_s = 0.0  # limit for loading it
        self.readable = asyncio.Event()
        self.readable.set()
        self._payload, self._relay = payload, relay or _relay
        self._copies: dict[str, _Copy] = {}
        self._copying: dict[str, asyncio.Lock] = {}
        self._putting = asyncio.Lock()
        self._stored: list[ray.ObjectRef] | None = None  # the newest snapshot's bytes in Ray's object store

    def set_newest(self, snapshot: Snapshot, timeout_s: float) -> None:
        """Set the newest snapshot and the limit for loading it."""
        self.newest, self.timeout_s = snapshot, timeout_s
        self._stored = None
        self.readable.set()

    def drop_stored(self) -> None:
        """Drop the object-store copy once all engines have loaded it. Late joiners request a new one."""
        self._stored = None

    def mark_lost(self) -> None:
        """Make loads wait for the next snapshot, because this one was lost with its publisher."""
        self.readable.clear()

    async def snapshot_on(self, node: str) -> Snapshot:
        """Return the newest snapshot with a path that is valid on `node`.

        FileNotFoundError if it was lost with its publisher. RayActorError if no relay can run on the node, which is
        lost then.
        """
        snapshot = self.newest
        assert snapshot is not None
        if node == snapshot.node:
            return snapshot
        async with self._copying.setdefault(node, asyncio.Lock()):
            copy = self._copies.get(node)
            if copy is None or copy.of is not snapshot:
                stored = await self._stored_bytes(snapshot)
                if copy is not None:
                    try:
                        await self._copy_to_relay(copy, snapshot, node, stored)
                    except RayActorError:  # perhaps only the relay has died
                        self.end_relay(node)
                        copy = None
                if copy is None:
                    copy = self._copies[node] = _Copy(self._relay(node))
                    try:
                        await self._copy_to_relay(copy, snapshot, node, stored)
                    except (RayActorError, ActorUnschedulableError) as error:
                        self.end_relay(node)
                        raise RayActorError from error
        return replace(snapshot, node=node, path=copy.path)

    async def _stored_bytes(self, snapshot: Snapshot) -> list[ray.ObjectRef]:
        """The snapshot's bytes in Ray's object store: put there once for all nodes."""
        async with self._putting:
            if self._stored is None:
                try:
                    self._stored = await self._payload(snapshot.role)
                except LearnerLost as error:
                    raise FileNotFoundError(f"{snapshot.role} weights v{snapshot.version}: {error}") from error
            return self._stored

    async def _copy_to_relay(self, copy: _Copy, snapshot: Snapshot, node: str, stored: list[ray.ObjectRef]) -> None:
        what = f"{snapshot.role} weights v{snapshot.version} to reach node {node}"
        copy.path = await within(copy.relay.call("store", snapshot.role, stored), self.timeout_s, what)
        copy.of = snapshot

    def end_relay(self, node: str) -> None:
        """End the node's relay: no engine there needs it, or it is lost. The next engine there gets a new relay."""
        copy = self._copies.pop(node, None)
        if copy is not None:
            copy.relay.kill()

    def stop(self) -> None:
        """End the relays."""
        for node in list(self._copies):
            self.end_relay(node)


def _relay(node: str) -> Remote:
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return RemoteActor(ray.remote(SnapshotRelay).options(num_cpus=0, scheduling_strategy=place).remote())
