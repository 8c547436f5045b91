"""As `memory`, but another node gets only what a version changes in the one before (actors/shared/changes.py).

    the learner's memory ─► changes since the version that the node has ─► Ray's object store ─► over the relay's copy

The result has the same bytes, and the engines check their digests. The whole snapshot is sent to a node that has none,
or another version than the one before, and wherever the changes are more than a quarter of it. The learner keeps a copy
of each role's last version, from the first one on that another node needs.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ray

from sdft.actors.shared.changes import Bytes, apply, changes
from sdft.actors.shared.types import LearnerLost, Snapshot, SnapshotDamaged, UpdateReport
from sdft.actors.transport.memory import MemoryTransport, NodeCopy
from sdft.actors.transport.protocol import Destination, Sender


class ChangesSender(Sender):
    """The learner's end."""

    def __init__(self) -> None:
        # Version and bytes of each role.
        self._offered: dict[str, tuple[int, Bytes]] = {}  # the newest; the next one overwrites the bytes
        self._kept: dict[str, tuple[int, Bytes]] = {}  # that which other nodes have got

    def offer(self, snapshot: Snapshot, payload: Any) -> Snapshot:
        """Note the bytes of the newest version."""
        self._offered[snapshot.role] = snapshot.version, payload
        return snapshot

    def changes(self, role: str, since: int | None) -> list[ray.ObjectRef] | None:
        """Return what the newest version changes in version `since`: a list of one reference to Changes.

        None: the whole must be sent. The newest version is kept for the next call in either case.
        """
        if role not in self._offered:  # of a learner that has been started again
            return None
        version, payload = self._offered[role]
        kept, before = self._kept.get(role, (None, None))
        found = None
        if before is not None and since == kept and before.nbytes == payload.nbytes:
            found = changes(before, payload)
        if before is not None and found is not None:
            apply(found, before)
        else:
            before = payload.copy()
        self._kept[role] = version, before
        return None if found is None else [ray.put(found)]


class ChangesTransport(MemoryTransport):
    """Delivers snapshots as MemoryTransport does, and to other nodes by their changes."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._finding = asyncio.Lock()
        self._found: tuple[Snapshot, int | None, list[Any] | None] | None = None  # a snapshot, since when, its changes

    @staticmethod
    def sender(device: str, address: str) -> ChangesSender:
        """Return the learner's end."""
        return ChangesSender()

    @asynccontextmanager
    async def sending(
        self, snapshot: Snapshot, engines: Sequence[Destination], timeout_s: float
    ) -> AsyncIterator[None]:
        """Keep changes and snapshot in the object store while engines load it."""
        async with super().sending(snapshot, engines, timeout_s):
            try:
                yield
            finally:
                self._found = None

    async def deliver(self, snapshot: Snapshot, engine: Destination, timeout_s: float) -> UpdateReport:
        """As MemoryTransport.deliver. After SnapshotDamaged the node gets the next snapshot whole."""
        try:
            return await super().deliver(snapshot, engine, timeout_s)
        except SnapshotDamaged:
            self.vacated(engine.process.node)
            raise

    async def _copy_to_relay(self, copy: NodeCopy, snapshot: Snapshot, node: str, timeout_s: float) -> None:
        found = await self._changes(snapshot, copy.of, timeout_s)
        if found is None:
            await super()._copy_to_relay(copy, snapshot, node, timeout_s)
        else:
            await self._in_relay(copy, snapshot, node, timeout_s, "apply", found)

    async def _stored_bytes(self, snapshot: Snapshot, timeout_s: float) -> list[Any]:
        await self._changes(snapshot, None, timeout_s)  # the learner keeps the version, to compare the next one with it
        return await super()._stored_bytes(snapshot, timeout_s)

    async def _changes(self, snapshot: Snapshot, of: Snapshot | None, timeout_s: float) -> list[Any] | None:
        """What a snapshot changes in the one that a node has; None: send the whole. Found once for all nodes."""
        async with self._finding:
            if self._found is None or self._found[0] is not snapshot:
                since = max((copy.of.version for copy in self._copies.values() if copy.of is not None), default=None)
                found = None if since == snapshot.version else await self._compared(snapshot, since, timeout_s)
                self._found = snapshot, since, found
            _, since, found = self._found
        return found if of is not None and of.version == since else None

    async def _compared(self, snapshot: Snapshot, since: int | None, timeout_s: float) -> list[Any] | None:
        what = f"the learner to compare {self.role} weights v{snapshot.version} with those before"
        try:
            found: list[Any] | None = await self.learner().sender("changes", timeout_s, what, self.role, since)
        except LearnerLost as error:
            raise FileNotFoundError(str(error)) from error
        except TimeoutError as error:
            self.notice(f"{error}; other nodes get the whole")
            return None
        return found
