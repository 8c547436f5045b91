"""Delivery of a role's weights from the learner to the role's engines, one version after the other.

    learner: publish ─► every engine: load, verify ─► release      under a lock of the pool, from publish to release

`deliver` waits until the engines have the weights. `publish` waits only for the publication: after it the learner may
change its weights, and the engines load while the learner continues.
"""

import asyncio
from collections.abc import Callable

from sdft.actors.shared.types import Snapshot, SnapshotDamaged
from sdft.actors.shared.waiting import cancelled
from sdft.learner.group import LearnerGroup
from sdft.services.base.failures import reason
from sdft.services.fleet.pool import EnginePool

TRIES = 3  # damaged snapshots in a row until SnapshotDamaged is raised


class WeightSync:
    """Delivers the weights of one role."""

    def __init__(
        self, role: str, pool: EnginePool, learner: LearnerGroup, timeout_s: float, notice: Callable[[str], None]
    ) -> None:
        self._role, self._pool, self._learner = role, pool, learner
        self._timeout_s, self._notice = timeout_s, notice
        self._delivery: asyncio.Task[None] | None = None
        self._damaged = 0  # damaged snapshots in a row
        self._gap: float | None = None
        self.version = -1  # newest version on all engines but those being replaced; -1: the weights they started with
        self.on_delivered: Callable[[int], None] = lambda version: None  # called with each new value of `version`

    async def deliver(self, version: int) -> float | None:
        """Publish the learner's weights, which are this version, and wait until all engines have verified them.

        Returns the largest gap of an engine. Returns None if all engines are being replaced: their replacements verify
        the weights before they serve.
        """
        while True:
            await self.publish(version)
            await self._join_delivery()
            if self.version == version:
                return self._gap

    async def publish(self, version: int) -> None:
        """Publish the learner's weights, which are this version. Waits for an earlier delivery first."""
        await self.wait_delivered()
        lock = self._pool.published.lock
        await lock.acquire()
        try:
            snapshot = await self._learner.publish(self._role, version)
        except BaseException:
            lock.release()
            raise
        self._delivery = asyncio.create_task(self._load_into_engines(snapshot), name=f"{self._role} weights v{version}")
        # The lock is not released in the task itself, because a task cancelled before it begins would keep the lock.
        self._delivery.add_done_callback(lambda _: lock.release())

    async def wait_delivered(self) -> None:
        """Wait until the engines have the weights that were sent.

        In a strict run a damaged snapshot is sent again at once: the learner still has that version. Otherwise the next
        version replaces it.
        """
        sent = await self._join_delivery()
        if sent is not None and self.version != sent and self._pool.settings.strict:
            await self.deliver(sent)

    async def wait_for_version(self, least: int, current: int) -> None:
        """Wait until the engines have version `least` or a later one. current: the learner's version."""
        await self.wait_delivered()
        if self.version < least:
            await self.deliver(current)

    async def stop(self) -> None:
        """Cancel the delivery in progress."""
        if self._delivery is not None:
            await cancelled([self._delivery])

    async def _join_delivery(self) -> int | None:
        """Wait for the delivery in progress and return its version; None if there is none."""
        delivery = self._delivery
        if delivery is None:
            return None
        await asyncio.shield(delivery)  # shielded: other callers may wait for the same delivery
        if self._delivery is delivery:
            self._delivery = None
        newest = self._pool.published.newest
        return None if newest is None else newest.version

    async def _load_into_engines(self, snapshot: Snapshot) -> None:
        try:
            reports = await self._pool.update_weights(snapshot, self._timeout_s)
        except SnapshotDamaged as error:
            # Damage in transit does not persist over retries. A snapshot that is damaged each time has another cause.
            self._damaged += 1
            if self._damaged == TRIES:
                raise
            self._notice(f"{reason(error)}; the snapshot is published again")
            return
        finally:
            await self._learner.release(self._role)
        self._damaged = 0
        self._gap = max((report.probe_gap for report in reports), default=None)
        self.version = snapshot.version
        self.on_delivered(snapshot.version)
