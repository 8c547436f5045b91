"""A role's weights on their way from the learner to the role's engines, one version after the other.

    learner: publish ─► every engine: load, verify ─► release      a lock of the pool from the first to the last

`now` waits for all of it. `send` waits for the publication alone, after which the learner may change its weights: the
engines load while the learner goes on.
"""

import asyncio
from collections.abc import Callable

from sdft.actors.shared.types import Snapshot, SnapshotDamaged
from sdft.actors.shared.waiting import cancelled
from sdft.learner.group import LearnerGroup
from sdft.services.base.failures import reason
from sdft.services.fleet.pool import EnginePool

TRIES = 3  # of a snapshot that arrives damaged


class WeightSync:
    """One role's."""

    def __init__(
        self, role: str, pool: EnginePool, learner: LearnerGroup, timeout_s: float, notice: Callable[[str], None]
    ) -> None:
        self._role, self._pool, self._learner = role, pool, learner
        self._timeout_s, self._notice = timeout_s, notice
        self._sending: asyncio.Task[None] | None = None
        self._damaged = 0  # in a row
        self._gap: float | None = None
        self.version = -1  # that all engines have which are not being replaced; -1: what they were started with
        self.arrived: Callable[[int], None] = lambda version: None  # is told each version that they have

    async def now(self, version: int) -> float | None:
        """Publish the learner's weights, which are this version, and wait until all engines have verified them.

        Returns the largest gap of log-probs; None if all engines are being replaced: their successors will verify them.
        """
        while True:
            await self.send(version)
            await self._arrived()
            if self.version == version:
                return self._gap

    async def send(self, version: int) -> None:
        """Publish the learner's weights, which are this version. Waits for those that were sent before."""
        await self.done()
        lock = self._pool.published.lock
        await lock.acquire()
        try:
            snapshot = await self._learner.publish(self._role, version)
        except BaseException:
            lock.release()
            raise
        self._sending = asyncio.create_task(self._deliver(snapshot), name=f"{self._role} weights v{version}")
        # Not in the task itself: one that is cancelled before it begins would keep the lock.
        self._sending.add_done_callback(lambda _: lock.release())

    async def done(self) -> None:
        """Returns when the engines have what was sent. In a strict run damaged ones are sent again at once, since the
        learner has not gone on; else the next ones will do."""
        sent = await self._arrived()
        if sent is not None and self.version != sent and self._pool.settings.strict:
            await self.now(sent)

    async def until(self, least: int, current: int) -> None:
        """Returns when the engines have version `least` or a later one; `current`: what the learner has now."""
        await self.done()
        if self.version < least:
            await self.now(current)

    async def stop(self) -> None:
        """Wait for nothing more."""
        if self._sending is not None:
            await cancelled([self._sending])

    async def _arrived(self) -> int | None:
        """Wait for what was sent; its version, None if nothing is on its way."""
        sending = self._sending
        if sending is None:
            return None
        await asyncio.shield(sending)  # others wait for it too
        if self._sending is sending:
            self._sending = None
        newest = self._pool.published.newest
        return None if newest is None else newest.version

    async def _deliver(self, snapshot: Snapshot) -> None:
        try:
            reports = await self._pool.update_weights(snapshot, self._timeout_s)
        except SnapshotDamaged as error:
            # What is damaged on the way arrives whole another time; what never does was not damaged on the way.
            self._damaged += 1
            if self._damaged == TRIES:
                raise
            self._notice(f"{reason(error)}; it is published again")
            return
        finally:
            await self._learner.release(self._role)
        self._damaged = 0
        self._gap = max((report.probe_gap for report in reports), default=None)
        self.version = snapshot.version
        self.arrived(snapshot.version)
